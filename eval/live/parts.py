"""The parts of all commands' views: plain lines, a view that is redrawn, bars, and figures in words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from specdec.util.terminal import Terminal

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

WIDTH = 80
_BAR = 16


class Lines:
    """Print plain lines below a title: a view for files and pipes."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title

    def __enter__(self) -> Self:
        self.print(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def print(self, text: str) -> None:
        """Print `text` as it is: no markup, no line broken by rich."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Redrawn(ABC):
    """Draw a view anew all the time while it is open, and a first time when it is made."""

    def __init__(self, console: Console, title: str, times_per_second: float, transient: bool = False) -> None:
        """Make the view, closed. `transient`: the last drawing is taken away when the view is closed."""
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
    def draw(self) -> RenderableType:
        """Return what the view shows now; rich's thread calls this."""


def position_table(positions: Sequence[dict[str, float]]) -> Table:
    """Return a table of acceptance by draft position, with bars."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, title="acceptance by position", title_justify="left")
    table.add_column("draft", justify="right")
    table.add_column("accepted, of all rounds", no_wrap=True)
    table.add_column("drafts that reached it", justify="right")
    table.add_column("accepted of those", justify="right")
    for p in positions:
        full = round(p["accepted"] * _BAR)
        bar = Text.assemble(("█" * full, "cyan"), ("░" * (_BAR - full), "dim"), f" {format_percent(p['accepted']):>4}")
        table.add_row(str(p["position"]), bar, str(p["reached"]), format_percent(p["accepted_of_reached"]))
    return table


@contextmanager
def count_bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """Draw a bar of `total` things on stderr where it is a terminal; yield what moves it on.

    `advance(done=1, what=None)`: `done` more are done; `what` describes them from now on, in rich's markup.
    """
    console = Terminal(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: int = 1, what: str | None = None) -> None:
            bar.update(task, advance=done, description=what)

        yield advance


def format_percent(value: float) -> str:
    """Return a share from 0 to 1 in whole percent."""
    return f"{100 * value:.0f}%"


def milliseconds(seconds: float) -> str:
    """Return a time in ms, from a second on in seconds."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def size(nbytes: float) -> str:
    """Return bytes in MB, from 10^9 on in GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def yes_or_no(value: bool) -> Text:
    """Return a green "yes" or a red "NO"."""
    return Text("yes", style="green") if value else Text("NO", style="bold red")
