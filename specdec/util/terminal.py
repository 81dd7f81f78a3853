"""A rich console that shows the text of others as it is, but without control characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from specdec.util.text import printable


class Terminal(Console):
    """Print on stdout, or on stderr with `stderr=True`, as rich's console does; all text goes through `printable`.

    Names of files and models may read like rich's markup: ollama:a:latest has an emoji in it, and of "m[2].gguf" rich
    would show "m.gguf", or raise an error. What is to have a style is a `rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        """Take the options of rich's console."""
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments that rich makes of `renderable`, without the control characters of their text."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or text.isprintable() else Segment(printable(text), style)
