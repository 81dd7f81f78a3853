"""The display of an answer while it comes, and the text that stays of it on the screen.

A terminal gets Markdown in styles and lines that end between words (`Typeset`). With the dashboard the end of the
answer stands above it, and the whole answer follows as ordinary text (`LiveAnswer`). A pipe, a dumb terminal, and a
user who asks for it, get the text as the model wrote it (`Raw`). A view takes pieces of text in `feed` and is open in a
`with` block.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from eval.chat.markdown import MarkdownStream
from eval.chat.wordwrap import WordWrap
from eval.live.blocks import HEIGHT
from eval.live.dashboard import Dashboard
from eval.live.parts import WIDTH, Redrawn
from specdec.util.text import visible

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

_TAIL = 8  # lines of an answer above the dashboard, where the terminal is high enough
_BREAK = 1000  # characters; a drawing of an answer begins at a multiple, or every redraw would break lines anew
_WAITING = "reading the prompt"


class View(Protocol):
    """Show an answer."""

    def feed(self, text: str) -> None:
        """Take in and show the next piece of the answer."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Raw:
    """Write an answer as the model wrote it; on a terminal, control characters as signs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = ""

    def feed(self, text: str) -> None:
        """Write `text` at once."""
        if text:
            self.console.file.write(visible(text) if self.console.is_terminal else text)
            self.console.file.flush()
            self._last = text[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last not in ("", "\n"):
            self.feed("\n")


class Typeset:
    """Write an answer as Markdown, word by word, in ordinary lines that the terminal keeps."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._markdown = MarkdownStream(WordWrap(console))
        self._waiting = False

    def feed(self, text: str) -> None:
        """Write `text` as far as its style is certain; the first piece takes the waiting line away."""
        if text:
            self._take_away()
            self._markdown.feed(visible(text))

    def __enter__(self) -> Self:
        self._waiting = self.console.width > len(_WAITING)  # one line, to be taken away
        if self._waiting:
            self.console.print(_WAITING, style="dim", end="")
        return self

    def __exit__(self, *_: object) -> None:
        self._take_away()
        self._markdown.close()

    def _take_away(self) -> None:
        if self._waiting:
            self._waiting = False
            self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


class LiveAnswer(Redrawn):
    """Draw the end of an answer that is on its way, above the dashboard; alone where the terminal is too low for both.

    `stays` makes the view that prints the whole answer in the end, however the end comes.
    """

    def __init__(self, console: Console, dashboard: Dashboard, stays: Callable[[Console], View]) -> None:
        self.dashboard, self.stays, self.text = dashboard, stays, ""
        super().__init__(console, "", 4, transient=True)

    def feed(self, text: str) -> None:
        """Add `text` to the answer; the next drawing shows it."""
        self.text += text

    def __exit__(self, *_: object) -> None:
        try:
            super().__exit__()
        finally:
            self.console.show_cursor()  # a second Ctrl-C may have come while the first one's was brought back
            if self.text:
                with self.stays(self.console) as whole:
                    whole.feed(self.text)

    def draw(self) -> RenderableType:
        """Return the last lines of the answer above the dashboard."""
        room = self.console.height - HEIGHT - 2  # one line between them, and one below, where the cursor ends
        below: list[RenderableType] = ["", self.dashboard]
        if room < 1:  # a frame that is higher than the terminal could not be taken away again
            room, below = max(1, self.console.height - 1), []
        room = min(room, _TAIL)
        text, width = self.text, min(self.console.width, WIDTH)
        recent = visible(text[max(0, len(text) // _BREAK - 1) * _BREAK :]) or _WAITING
        lines = Text(recent, style="" if text else "dim").wrap(self.console, width)[-room:]
        return Group(*lines, *[Text()] * (room - len(lines)), *below)


def moves_the_cursor(console: Console) -> bool:
    """Tell whether text on `console` can be taken away and styled: not in a file, nor on a dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


def view_of(console: Console, dashboard: Dashboard | None, markdown: bool) -> View:
    """Return the view of the next answer. `dashboard`: to be drawn below the answer, None: not."""
    styled = markdown and moves_the_cursor(console)
    if dashboard is not None and moves_the_cursor(console):
        return LiveAnswer(console, dashboard, Typeset if styled else Raw)
    return Typeset(console) if styled else Raw(console)


def shorten(text: str, longest: int = 200) -> str:
    """Return `text` in one line of at most `longest` characters, without its middle where it is longer."""
    line = " ".join(visible(text).split())
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 3].rstrip()} … {line[-end:].lstrip()}"
