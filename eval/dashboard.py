"""What bench shows: a live view on a terminal, plain lines elsewhere, and the tables at the end. 80 columns suffice.

Only draws: figures come from `eval.metrics`. The live view redraws four times a second from what its streamers have
counted, in rich's own thread, and its cost falls on plain and drafted runs alike.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from eval.metrics import Pair

WIDTH = 80
_BAR = 16
_TAIL = 120  # newest tokens of an answer that the live view shows


class Watch(BaseStreamer):  # type: ignore[misc]
    """Counts the tokens of a run while they come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.began = time.perf_counter()
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:  # generate() hands over the prompt first
            self._prompt = False
        else:
            self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        pass

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / max(time.perf_counter() - self.began, 1e-9)


class View(AbstractContextManager["View"], Protocol):
    """Hears how a bench goes on."""

    def begin(self, number: int, name: str, mode: str) -> Watch | None:
        """Prompt `number` (from 1) is decoded in `mode` now; returns a streamer that wants to hear of it."""

    def finished(self, pair: Pair) -> None:
        """Both of a prompt's runs are done."""


class Lines:
    """A view for files and pipes, in plain lines below a title."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title

    def __enter__(self) -> Self:
        self.print(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Redrawn(ABC):
    """A view that draws itself anew all the time while it is open, and a first time when it is made."""

    def __init__(self, console: Console, title: str, times_per_second: float, transient: bool = False) -> None:
        self.console, self.title = console, title
        self.live = Live(
            console=console, get_renderable=self.draw, refresh_per_second=times_per_second, transient=transient
        )

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @abstractmethod
    def draw(self) -> RenderableType: ...


class PlainView(Lines):
    """One line per finished prompt, for files and pipes."""

    def __init__(self, console: Console, title: str, total: int, text: Callable[[Sequence[int]], str]) -> None:
        super().__init__(console, title)
        self.total, self.done = total, 0

    def begin(self, number: int, name: str, mode: str) -> None:
        return None

    def finished(self, pair: Pair) -> None:
        self.done += 1
        self.print(
            f"{self.done}/{self.total} {pair.name}: {len(pair.plain.tokens)} tokens, "
            f"plain {pair.plain.tokens_per_second:.1f}/s, drafted {pair.drafted.tokens_per_second:.1f}/s, "
            f"{pair.speedup:.2f}x, {'identical' if pair.identical else 'DIFFERENT'}"
        )


class LiveView(Redrawn):
    """What is being decoded, at what speed, above the table of what is done."""

    def __init__(self, console: Console, title: str, total: int, text: Callable[[Sequence[int]], str]) -> None:
        self.total, self.text = total, text
        self.number, self.name, self.mode = 0, "", "warming up"
        self.watch = Watch()
        self.pairs: list[Pair] = []
        super().__init__(console, title, 4, transient=True)

    def begin(self, number: int, name: str, mode: str) -> Watch:
        self.number, self.name, self.mode, self.watch = number, name, mode, Watch()
        return self.watch

    def finished(self, pair: Pair) -> None:
        self.pairs.append(pair)

    def draw(self) -> RenderableType:
        room = max(self.console.height - 12, 2)
        parts: list[RenderableType] = [self._now()]
        if self.pairs:
            parts += ["", prompt_table(self.pairs[-room:])]
        return Group(*parts)

    def _now(self) -> RenderableType:
        watch = self.watch
        status = Table.grid(expand=True)
        status.add_column(ratio=1, no_wrap=True)
        status.add_column(justify="right", no_wrap=True)
        style = "cyan" if self.mode == "drafted" else "white"
        left = Text.assemble((f"{self.mode:<10}", f"bold {style}"), f" {self.number}/{self.total} {self.name}")
        right = f"{len(watch.tokens)} tokens {watch.tokens_per_second:6.1f}/s" if watch.tokens else "reading the prompt"
        status.add_row(left if self.number else Text(self.mode, style="bold"), right if self.number else "")
        lines = Text(self.text(watch.tokens[-_TAIL:]), style="dim").wrap(self.console, self._width - 4)[-4:]
        tail = [*lines, *[Text()] * (4 - len(lines))]  # a panel of one height: the tables below must not jump
        return Panel(Group(status, *tail), title=self.title, title_align="left", width=self._width, border_style="dim")

    @property
    def _width(self) -> int:
        return min(self.console.width, WIDTH)


def view_for(console: Console, title: str, total: int, text: Callable[[Sequence[int]], str]) -> View:
    """The live view where `console` is a terminal, plain lines elsewhere. `text` decodes token ids."""
    return (LiveView if console.is_terminal else PlainView)(console, title, total, text)


def prompt_table(pairs: Sequence[Pair]) -> Table:
    """One row per prompt."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("prompt", no_wrap=True, max_width=20)
    for name in ("tokens", "plain/s", "drafted/s", "speed-up", "length", "accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("identical", justify="center", no_wrap=True)
    for pair in pairs:
        stats = pair.drafted.stats
        table.add_row(
            Text(pair.name),
            str(len(pair.plain.tokens)),
            f"{pair.plain.tokens_per_second:.1f}",
            f"{pair.drafted.tokens_per_second:.1f}",
            Text(f"{pair.speedup:.2f}x", style=_good_or_bad(pair.speedup)),
            f"{stats.mean_acceptance_length:.2f}",
            share(stats.acceptance_rate) if stats.drafted else "-",
            yes_or_no(pair.identical),
        )
    return table


def summary_table(figures: dict[str, Any], memory: dict[str, int | None], kernels: str) -> Table:
    """The figures of `eval.metrics.compare`, plain beside drafted."""
    plain, drafted = figures["plain"], figures["drafted"]
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in ("plain", "drafted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")

    def row(name: str, show: Callable[[dict[str, Any]], str], note: str = "") -> None:
        table.add_row(name, show(plain), show(drafted), Text(note, style="dim"))

    row("tokens/s", lambda f: f"{f['tokens_per_second']:.1f}", "prefill included")
    row("tokens/s after the first", lambda f: f"{f['decode_tokens_per_second']:.1f}")
    row("time to first token", lambda f: milliseconds(f["ttft"]["p50"]), "TTFT, median")
    row("per token after it", lambda f: milliseconds(f["tpot"]["p50"]), "TPOT, median")
    row("between deliveries", lambda f: milliseconds(f["itl"]["p50"]), "ITL, median")
    row("", lambda f: milliseconds(f["itl"]["p99"]), "ITL, 99th percentile")
    note = f"median {figures['speedup_median']:.2f}x, lowest {figures['speedup_lowest']:.2f}x"
    speedup = Text(f"{figures['speedup']:.2f}x", style=f"bold {_good_or_bad(figures['speedup'])}")
    table.add_row("speed-up", "", speedup, Text(note, style="dim"))
    length = f"{drafted['mean_acceptance_length']:.2f}"
    table.add_row("mean acceptance length", "", length, Text("tokens per round", style="dim"))
    counts = f"{drafted['accepted']:,} of {drafted['drafted']:,} drafted tokens"
    rate = share(drafted["acceptance_rate"]) if drafted["drafted"] else "-"
    table.add_row("acceptance rate", "", rate, Text(counts, style="dim"))
    if memory["process"] is not None:
        table.add_row("peak memory", "", size(memory["process"]), Text("of the process, both modes", style="dim"))
    if memory["device"] is not None:
        table.add_row("peak device memory", "", size(memory["device"]), Text("allocated by torch", style="dim"))
    same = figures["prompts"] - len(figures["differing"])
    texts = f"{same} of {figures['prompts']} texts, token for token"
    table.add_row("identical", "", yes_or_no(figures["identical"]), Text(texts, style="dim"))
    table.caption, table.caption_justify = Text(f"kernels: {kernels}", style="dim"), "left"
    return table


def position_table(positions: Sequence[dict[str, float]]) -> Table:
    """Acceptance by draft position, with bars."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, title="acceptance by position", title_justify="left")
    table.add_column("draft", justify="right")
    table.add_column("accepted, of all rounds", no_wrap=True)
    table.add_column("drafts that reached it", justify="right")
    table.add_column("accepted of those", justify="right")
    for p in positions:
        full = round(p["accepted"] * _BAR)
        bar = Text.assemble(("█" * full, "cyan"), ("░" * (_BAR - full), "dim"), f" {share(p['accepted']):>4}")
        table.add_row(str(p["position"]), bar, str(p["reached"]), share(p["accepted_of_reached"]))
    return table


def share(value: float) -> str:
    return f"{100 * value:.0f}%"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def yes_or_no(value: bool) -> Text:
    return Text("yes", style="green") if value else Text("NO", style="bold red")


def _good_or_bad(speedup: float) -> str:
    return "green" if speedup >= 1.02 else "red" if speedup < 0.98 else "white"
