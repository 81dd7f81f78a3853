"""A rich console that shows the text of others without control characters."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from specdec.util.text import printable


class Terminal(Console):
    """A console on stdout, or on stderr with `stderr=True`; all text printed on it goes through `printable`."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments that rich makes of `renderable`, without the control characters of their text."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or text.isprintable() else Segment(printable(text), style)
