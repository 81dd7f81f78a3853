"""The display of a bench while it runs: a live dashboard on a terminal, plain lines elsewhere. 80 columns suffice.

The module only draws. The live view redraws four times a second from the counts of its streamers, in rich's own thread,
and its cost falls on all modes of ours alike.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any, Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from eval.bench.comparison import PREFILL, Turn
from eval.bench.tables import speedup_text
from eval.cli.names import PLAIN
from eval.cli.session import Session
from eval.live.blocks import HEIGHT
from eval.live.dashboard import Dashboard
from eval.live.parts import WIDTH, Lines, Redrawn
from specdec.engine.stats import Round

_TAIL = 120  # newest tokens of an answer that the live view shows
_TEXT = 3  # lines of it


class Watch(BaseStreamer):  # type: ignore[misc]
    """Count the tokens of a run while they come, and pass its rounds on to `dashboard`."""

    def __init__(self, dashboard: Dashboard) -> None:
        self.tokens: list[int] = []
        self.dashboard = dashboard
        self.began = time.perf_counter()
        self._prompt = True

    def put(self, value: Any) -> None:
        """Take token ids from `generate`; its first call hands over the prompt, which does not count."""
        if self._prompt:  # generate() hands over the prompt first
            self._prompt = False
        else:
            self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        """Do nothing: the next run gets a watch of its own."""

    def on_round(self, done: Round) -> None:
        """Hand a finished round to the dashboard."""
        self.dashboard.on_round(done)

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens a second since this watch was made, the reading of the prompt included."""
        return len(self.tokens) / max(time.perf_counter() - self.began, 1e-9)


class View(AbstractContextManager["View"], Protocol):
    """Show how a bench goes on."""

    def begin(self, number: int, name: str, mode: str) -> Watch | None:
        """Begin to show prompt `number` (from 1) in `mode`; return the streamer that counts its tokens, or None."""

    def finished(self, turn: Turn) -> None:
        """Show a prompt that all modes have decoded."""


class PlainView(Lines):
    """Print one line per finished turn, for files and pipes."""

    def __init__(self, console: Console, title: str, prompts: int, repeat: int) -> None:
        super().__init__(console, title)
        self.prompts, self.repeat, self.number = prompts, repeat, 0

    def begin(self, number: int, name: str, mode: str) -> None:
        """Note the number of the prompt for its line; nothing is counted."""
        self.number = number

    def finished(self, turn: Turn) -> None:
        """Print the line of `turn`: tokens a second of every mode, and which texts differ from the plain one."""
        again = f" ({turn.repetition} of {self.repeat})" if self.repeat > 1 else ""
        if turn.name == PREFILL:
            tokens = turn.plain.stats.prompt_tokens
            rates = [f"{name} {tokens / max(run.stats.ttft, 1e-9):.0f}/s" for name, run in turn.runs.items()]
            self.print(f"prefill of {tokens} tokens{again}: {', '.join(rates)}")
            return
        rates = [f"{name} {run.tokens_per_second:.1f}/s" for name, run in turn.runs.items()]
        others = [name for name in turn.runs if name != PLAIN]
        if len(others) == 1:
            rates.append(f"{turn.speedup(others[0]):.2f}x")
        different = [name for name in others if turn.runs[name].tokens and turn.difference(name) is not None]
        same = f"DIFFERENT: {', '.join(different)}" if different else "identical"
        tokens = len(turn.plain.tokens)
        self.print(f"{self.number}/{self.prompts} {turn.name}{again}: {tokens} tokens, {', '.join(rates)}, {same}")


class LiveView(Redrawn):
    """Draw the text under way, the dashboard of drafting, and the finished turns."""

    def __init__(self, console: Console, title: str, prompts: int, repeat: int, session: Session) -> None:
        self.prompts, self.repeat, self.session = prompts, repeat, session
        self.number, self.name, self.mode = 0, "", "warming up"
        self.turns: list[Turn] = []
        self.dashboards: dict[str, Dashboard] = {}
        self.shown = self._dashboard("")  # of the last mode that drafts
        self.watch = Watch(self.shown)
        super().__init__(console, title, 4, transient=True)

    def begin(self, number: int, name: str, mode: str) -> Watch:
        """Show that prompt `number` is decoded in `mode`, and return the streamer that counts its tokens."""
        self.number, self.name, self.mode = number, name, mode
        self.watch = Watch(self._dashboard(mode))
        if mode != PLAIN:
            self.shown = self.watch.dashboard
        return self.watch

    def finished(self, turn: Turn) -> None:
        """Add `turn` to the list, and give the plain speed so far to all dashboards; prefill turns are not listed."""
        if turn.name == PREFILL:
            return
        self.turns.append(turn)
        plain = [turn.plain.stats for turn in self.turns]
        seconds = sum(stats.total_seconds - stats.seconds["prefill"] for stats in plain)
        for dashboard in self.dashboards.values():
            dashboard.plain = sum(stats.emitted - 1 for stats in plain) / seconds if seconds > 0 else None

    def draw(self) -> RenderableType:
        """Return the text under way, the dashboard, and as many finished turns as the terminal has room for."""
        parts: list[RenderableType] = [self._now(), self.shown]
        if (room := self.console.height - HEIGHT - _TEXT - 8) > 0 and self.turns:
            parts.append(self._done(room))
        return Group(*parts)

    def _dashboard(self, mode: str) -> Dashboard:
        if mode not in self.dashboards:
            self.dashboards[mode] = Dashboard(self.session.costs, self.session.memory)
        return self.dashboards[mode]

    def _now(self) -> RenderableType:
        watch, width = self.watch, min(self.console.width, WIDTH)
        status = Table.grid(expand=True)
        status.add_column(ratio=1, no_wrap=True)
        status.add_column(justify="right", no_wrap=True)
        style = "white" if self.mode == PLAIN else "cyan"
        again = f", {self.turns[-1].repetition if self.turns else 1} of {self.repeat}" if self.repeat > 1 else ""
        what = f" {self.number}/{self.prompts}{again} {self.name}"
        left = Text.assemble((f"{self.mode:<10}", f"bold {style}"), what)
        right = f"{len(watch.tokens)} tokens {watch.tokens_per_second:6.1f}/s" if watch.tokens else "reading the prompt"
        status.add_row(left if self.number else Text(self.mode, style="bold"), right if self.number else "")
        text = self.session.text(watch.tokens[-_TAIL:])
        lines = Text(text, style="dim").wrap(self.console, width - 4)[-_TEXT:]
        tail = [*lines, *[Text()] * (_TEXT - len(lines))]  # a panel of one height: the parts below must not jump
        return Panel(Group(status, *tail), title=self.title, title_align="left", width=width, border_style="dim")

    def _done(self, room: int) -> Table:
        table = Table(box=box.SIMPLE, show_edge=False, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True, max_width=24)
        for turn in self.turns[-room:]:
            others = [name for name in turn.runs if name != PLAIN]
            speeds, width = Text(), min(self.console.width, WIDTH) - 42
            for name in others:  # whole, or not at all
                speed = Text(f"{name} ").append(speedup_text(turn.speedup(name))).append(" ")
                if speeds.cell_len + speed.cell_len <= width:
                    speeds.append(speed)
            table.add_row(Text(turn.name), f"{turn.plain.tokens_per_second:.1f}/s plain", speeds)
        return table


def view_for(console: Console, title: str, prompts: int, repeat: int, session: Session) -> View:
    """Return the live view where `console` is a terminal, plain lines elsewhere."""
    if console.is_terminal:
        return LiveView(console, title, prompts, repeat, session)
    return PlainView(console, title, prompts, repeat)
