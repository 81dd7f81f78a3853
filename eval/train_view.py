"""What `run.py train` shows: a live view on a terminal, plain lines elsewhere. 80 columns suffice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from drafter.course import Began, Event, Scored
from drafter.dataset import Size
from drafter.training import StepReport
from eval.dashboard import WIDTH, Lines, Redrawn, share

_SMOOTH = 0.95  # of the figures of a step, which jump from batch to batch
_EVERY = 30.0  # seconds between plain lines


class TrainView(AbstractContextManager["TrainView"], Protocol):
    """Hears what a course does. `done` 0..1: the share of the phase that is over."""

    def heard(self, event: Event, done: float) -> None: ...


class Running:
    """The figures of training, smoothed, and its speed."""

    def __init__(self) -> None:
        self.step = self.tokens = 0
        self.loss = self.feature = self.rate = 0.0
        self.per_position: tuple[float, ...] = ()
        self._began = time.monotonic()

    def add(self, report: StepReport) -> None:
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
        return self.tokens / max(1e-9, time.monotonic() - self._began)

    def line(self) -> str:
        drafts = " ".join(f"{value:.2f}" for value in self.per_position)
        return f"step {self.step}: loss {self.loss:.2f}, drafts right {drafts}, {self.tokens_per_second:.0f} tokens/s"


class PlainLines(Lines):
    """One line per event, steps at most every half minute: for files and pipes."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, title)
        self.running, self._last = Running(), time.monotonic()

    def heard(self, event: Event, done: float) -> None:
        if isinstance(event, StepReport):
            self.running.add(event)
            if time.monotonic() - self._last >= _EVERY:
                self._last = time.monotonic()
                self.print(f"{share(done)} {self.running.line()}")
        elif isinstance(event, Size):
            if event.shards:
                self.print(collected(event))
        elif isinstance(event, Began):
            self.print(begun(event))
            self.running = Running()
        else:
            self.print(scored(event))


class LiveTraining(Redrawn):
    """The phase with its bar and time left, the drafts' accuracy by position, and the evaluations."""

    def __init__(self, console: Console, title: str) -> None:
        self.phase, self.done, self.note = "loading", 0.0, ""
        self.running = Running()
        self.scores: list[Scored] = []
        self._began, self._from = time.monotonic(), 0.0
        super().__init__(console, title, 2)

    def heard(self, event: Event, done: float) -> None:
        if isinstance(event, Size):
            self._enter("collecting answers", done)
            self.note = collected(event) if event.shards else "the first answers are on their way"
        elif isinstance(event, Began):
            self.running = Running()
            self._enter("training", done)
            self.note = begun(event)
        elif isinstance(event, StepReport):
            self.running.add(event)
        else:
            self.scores.append(event)
        self.done = done

    def _enter(self, phase: str, done: float) -> None:
        if phase != self.phase:
            self.phase, self._began, self._from = phase, time.monotonic(), done

    def draw(self) -> RenderableType:
        width = min(self.console.width, WIDTH)
        bar = Table.grid(expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(f"{self.phase}  ", ProgressBar(total=1.0, completed=min(1.0, self.done)), f"  {self._left()}")
        parts: list[RenderableType] = [bar, Text(self.note, style="dim")]
        if self.running.step:
            parts += ["", self._figures()]
        if self.scores:
            parts += ["", score_table(self.scores[-8:])]
        return Panel(Group(*parts), title=self.title, title_align="left", width=width, border_style="dim")

    def _left(self) -> str:
        passed, gone = time.monotonic() - self._began, self.done - self._from
        if gone <= 0 or self.done >= 1:
            return share(self.done)
        left = passed / gone * (1 - self.done)
        return (
            f"{share(self.done)}, {left / 60:.0f} min left" if left > 90 else f"{share(self.done)}, {left:.0f} s left"
        )

    def _figures(self) -> RenderableType:
        running = self.running
        grid = Table.grid(padding=(0, 2))
        grid.add_row("step", f"{running.step}", "tokens/s", f"{running.tokens_per_second:.0f}")
        grid.add_row("loss", f"{running.loss:.3f}", "feature loss", f"{running.feature:.3f}")
        drafts = "  ".join(share(value) for value in running.per_position)
        grid.add_row("drafts right", drafts, "learning rate", f"{running.rate:.1e}")
        return grid


def view_for(console: Console, title: str) -> TrainView:
    """The live view where `console` is a terminal, plain lines elsewhere."""
    return LiveTraining(console, title) if console.is_terminal else PlainLines(console, title)


def collected(size: Size) -> str:
    speed = f", {size.answered / size.seconds:.0f} answered/s" if size.seconds else ""
    return f"{size.tokens:,} tokens collected, {size.answered:,} of them answers{speed}"


def begun(event: Began) -> str:
    again = f"going on at step {event.step}: " if event.step else ""
    parts = f"{event.parameters / 1e6:.1f}M parameters, {event.candidates:,} candidates"
    return f"{again}{parts} ({share(event.coverage)} of the choices)"


def scored(event: Scored) -> str:
    drafts = " ".join(f"{value:.2f}" for value in event.per_position)
    best = ", the best so far" if event.best else ""
    return (
        f"after {event.tokens:,} tokens, {event.seconds / 60:.1f} min: {event.real:.2f} tokens per round decoded "
        f"({event.offline:.2f} offline), drafts {drafts}{best}"
    )


def score_table(scores: Sequence[Scored]) -> Table:
    """One row per evaluation."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in ("minutes", "tokens", "per round", "offline", "accepted by position", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for score in scores:
        drafts = " ".join(share(value) for value in score.per_position)
        best = Text("best", style="green") if score.best else Text()
        row = (f"{score.seconds / 60:.1f}", f"{score.tokens:,}", f"{score.real:.2f}", f"{score.offline:.2f}", drafts)
        table.add_row(*row, best)
    return table
