"""The display of `run.py train`: a live view on a terminal, plain lines elsewhere. 80 columns suffice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from drafter.data.dataset import Size
from drafter.train.judge import Scored
from drafter.train.run import Began, Event, Status
from drafter.train.trainer import StepReport
from eval.live.parts import WIDTH, Lines, Redrawn, format_percent

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

_SMOOTH = 0.95  # of the figures of a step, which jump from batch to batch
_EVERY = 30.0  # seconds between plain lines


class TrainView(AbstractContextManager["TrainView"], Protocol):
    """Show the events of a training run, and its status."""

    def on_event(self, event: Event) -> None:
        """Show an event of the run."""


class Running:
    """Keep the figures of training, smoothed, and its speed."""

    def __init__(self) -> None:
        self.step = self.tokens = 0
        self.loss = self.feature = self.rate = 0.0
        self.per_position: tuple[float, ...] = ()
        self._began = time.monotonic()

    def add(self, report: StepReport) -> None:
        """Take in the report of a step: losses and accepted shares as moving averages."""
        first, keep = not self.per_position, _SMOOTH
        self.step, self.rate = report.step, report.learning_rate
        self.tokens += report.tokens

        def smooth(old: float, new: float) -> float:
            return new if first else keep * old + (1 - keep) * new

        self.loss = smooth(self.loss, report.cross_entropy)
        self.feature = smooth(self.feature, report.feature)
        old = self.per_position or report.per_position
        self.per_position = tuple(smooth(a, b) for a, b in zip(old, report.per_position, strict=True))

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens trained on a second, since training began or went on."""
        return self.tokens / max(1e-9, time.monotonic() - self._began)

    def line(self) -> str:
        """Return step, loss, accepted shares by position and speed in one line."""
        drafts = " ".join(f"{value:.2f}" for value in self.per_position)
        return f"step {self.step}: loss {self.loss:.2f}, drafts right {drafts}, {self.tokens_per_second:.0f} tokens/s"


class TimeLeft:
    """Put the time left in words: as the run knows it, or else as estimated from the speed of its phase."""

    def __init__(self) -> None:
        self._phase, self._began, self._from = "", 0.0, 0.0

    def __call__(self, status: Status) -> str:
        """Return ", 5.0 min left" for a run in this status; "" where nothing tells the time yet."""
        if status.phase != self._phase:
            self._phase, self._began, self._from = status.phase, time.monotonic(), status.done
        left, gone = status.left, status.done - self._from
        if left is None and gone > 0:
            left = (time.monotonic() - self._began) / gone * (1 - status.done)
        if left is None:
            return ""
        return f", {left / 60:.1f} min left" if left >= 90 else f", {left:.0f} s left"


class PlainLines(Lines):
    """Print a line for each event but steps, and the status of the run after a while without a line."""

    def __init__(self, console: Console, title: str, status: Callable[[], Status], every: float = _EVERY) -> None:
        """Make the view, closed. `status` is asked when no line has come for `every` seconds."""
        super().__init__(console, title)
        self.running, self._status, self._every = Running(), status, every
        self._left, self._said = TimeLeft(), time.monotonic()
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)  # phases without events can be long

    def __enter__(self) -> Self:
        super().__enter__()
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._clock.join()

    def print(self, text: str) -> None:
        """Print a line, and note the time: the next status line comes a while after it."""
        self._said = time.monotonic()
        super().print(text)

    def on_event(self, event: Event) -> None:
        """Print the line of `event`; a step is only counted."""
        if isinstance(event, StepReport):
            self.running.add(event)
        elif isinstance(event, Size):
            if event.shards:
                self.print(f"{_describe_collection(event)}{self._left(self._status())}")
        elif isinstance(event, Began):
            self.print(f"{_describe_start(event)}{self._left(self._status())}")
            self.running = Running()
        else:
            self.print(f"{_describe_score(event)}{self._left(self._status())}")

    def _tick(self) -> None:
        while not self._closed.wait(self._said + self._every - time.monotonic()):
            if time.monotonic() - self._said >= self._every:
                status = self._status()
                self.print(f"{where(status, self.running)}{self._left(status)}")


class LiveTraining(Redrawn):
    """Draw the phase with its bar and time left, the drafts' accuracy by position, and the evaluations."""

    def __init__(self, console: Console, title: str, status: Callable[[], Status]) -> None:
        self.note = ""
        self.running, self._status, self._left = Running(), status, TimeLeft()
        self.scores: list[Scored] = []
        super().__init__(console, title, 2)

    def on_event(self, event: Event) -> None:
        """Take `event` into the next drawing."""
        if isinstance(event, Size):
            self.note = _describe_collection(event) if event.shards else "the first answers are on their way"
        elif isinstance(event, Began):
            self.running = Running()
            self.note = _describe_start(event)
        elif isinstance(event, StepReport):
            self.running.add(event)
        else:
            self.scores.append(event)

    def draw(self) -> RenderableType:
        """Return the panel: phase, bar, time left, figures of training, and the last eight evaluations."""
        width = min(self.console.width, WIDTH)
        bar = Table.grid(expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        status = self._status()
        left = f"{format_percent(status.done)}{self._left(status)}"
        bar.add_row(f"{status.phase}  ", ProgressBar(total=1.0, completed=min(1.0, status.done)), f"  {left}")
        parts: list[RenderableType] = [bar, Text(self.note, style="dim")]
        if self.running.step:
            parts += ["", self._figures()]
        if self.scores:
            parts += ["", score_table(self.scores[-8:])]
        return Panel(Group(*parts), title=self.title, title_align="left", width=width, border_style="dim")

    def _figures(self) -> RenderableType:
        running = self.running
        grid = Table.grid(padding=(0, 2))
        grid.add_row("step", f"{running.step}", "tokens/s", f"{running.tokens_per_second:.0f}")
        grid.add_row("loss", f"{running.loss:.3f}", "feature loss", f"{running.feature:.3f}")
        drafts = "  ".join(format_percent(value) for value in running.per_position)
        grid.add_row("drafts right", drafts, "learning rate", f"{running.rate:.1e}")
        return grid


def view_for(console: Console, title: str, status: Callable[[], Status]) -> TrainView:
    """Return the live view where `console` is a terminal, plain lines elsewhere."""
    return LiveTraining(console, title, status) if console.is_terminal else PlainLines(console, title, status)


def where(status: Status, running: Running) -> str:
    """Describe in one line where a run is."""
    parts = [f"{status.phase}, {format_percent(status.done)}: {status.tokens:,} tokens"]
    if running.step:
        parts.append(running.line())
    if status.real is not None:
        parts.append(f"best {status.real:.2f} tokens per round")
    return ", ".join(parts)


def _describe_collection(size: Size) -> str:
    speed = f", {size.answered / size.seconds:.0f}/s of those" if size.seconds else ""
    return f"{size.tokens:,} tokens collected, {size.answered:,} of them behind prompts{speed}"


def _describe_start(event: Began) -> str:
    again = f"going on at step {event.step}: " if event.step else ""
    parts = f"{event.parameters / 1e6:.1f}M parameters, {event.candidates:,} candidates"
    return f"{again}{parts} ({format_percent(event.coverage)} of the choices)"


def _describe_score(event: Scored) -> str:
    drafts = " ".join(f"{value:.2f}" for value in event.per_position)
    best = ", the best so far" if event.best else ""
    return (
        f"after {event.tokens:,} tokens, {event.seconds / 60:.1f} min: {event.real:.2f} tokens per round decoded "
        f"({event.offline:.2f} offline), drafts {drafts}{best}"
    )


def score_table(scores: Sequence[Scored]) -> Table:
    """Return a table with one row per evaluation."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in ("minutes", "tokens", "per round", "offline", "accepted by position", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for score in scores:
        drafts = " ".join(format_percent(value) for value in score.per_position)
        best = Text("best", style="green") if score.best else Text()
        row = (f"{score.seconds / 60:.1f}", f"{score.tokens:,}", f"{score.real:.2f}", f"{score.offline:.2f}", drafts)
        table.add_row(*row, best)
    return table
