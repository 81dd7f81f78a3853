"""A table in which no figure is ever cut: names are broken or cut instead, and columns that have no room are left
out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_NAME = 10  # letters of a name that always stand in one line
_ENDLESS = 10_000


@dataclass(frozen=True)
class Column:
    """Describe a column of figures below `name`. Of columns without room those of the least `need` are left out
    first."""

    name: str
    need: int
    justify: Literal["right", "center"] = "right"


class FigureTable:
    """Draw names on the left and figures in `columns`, as wide as the console allows; name the columns that are left
    out.

    Names that have no room are broken into lines, or cut where `whole` is false.
    """

    def __init__(
        self, first: str, columns: Sequence[Column], title: str = "", caption: str = "", whole: bool = True
    ) -> None:
        """Begin without a row. `first`: what stands above the names; `caption`: a line below the table."""
        self.first, self.columns, self.title, self.caption, self.whole = first, columns, title, caption, whole
        self.rows: list[tuple[str, Sequence[Any]]] = []

    def add(self, name: str, cells: Sequence[Any]) -> None:
        """Add a row: `cells` are text, plain or rich's, one for each of the columns."""
        assert len(cells) == len(self.columns), (name, cells)
        self.rows.append((name, cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = list(self.columns)
        for column in sorted(self.columns, key=lambda column: column.need)[:-1]:
            if self._width(console, options, shown) <= options.max_width:
                break
            shown.remove(column)
        yield self._drawn(shown, _NAME + max(0, options.max_width - self._width(console, options, shown)))
        if left_out := [" ".join(column.name.split()) for column in self.columns if column not in shown]:
            yield Text(f"no room for: {', '.join(left_out)}", style="dim")
        if self.caption:
            yield Text(self.caption, style="dim")

    def _width(self, console: Console, options: ConsoleOptions, shown: Sequence[Column]) -> int:
        """Return the width of the table with the least part of its names in one line."""
        return console.measure(self._drawn(shown, _NAME), options=options.update(max_width=_ENDLESS)).maximum

    def _drawn(self, shown: Sequence[Column], name: int) -> Table:
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
        table.title, table.title_justify = Text(self.title), "left"
        table.add_column(
            self.first, overflow="fold" if self.whole else "ellipsis", no_wrap=not self.whole, max_width=name
        )
        for column in shown:
            table.add_column(column.name, justify=column.justify, no_wrap=True)
        for text, cells in self.rows:
            kept = (cell for cell, column in zip(cells, self.columns, strict=True) if column in shown)
            table.add_row(Text(text), *kept)
        return table
