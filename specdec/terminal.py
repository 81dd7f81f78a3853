"""What a terminal is shown: text without control characters, whoever wrote it.

Names of models and prompts, metadata of files, and what a model generates come from others. An escape sequence in them
would move the cursor, retitle the window or type into the shell. So text reaches a terminal through `printable`: in a
`Terminal`, which is a rich console, of itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_CONTROL = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")


def printable(text: str) -> str:
    """Return `text` without its control characters (C0, DEL and C1), except line ends and tabs."""
    return text.translate(_CONTROL)


class Terminal(Console):
    """A rich console on stdout, or on stderr with `stderr=True`, that shows the text of everything printed on it
    without control characters."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or text.isprintable() else Segment(printable(text), style)
