"""Styled words onto a terminal as they come, with lines broken between words only.

Widths are counted in cells: a CJK character or an emoji takes two, a combining mark none. The terminal's width is read
at every word, so that lines follow when the window's size changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_PIECES = re.compile(r"\n|[ \t]+|[^ \t\n]+")
_TAB = "    "
_STAYS = frozenset("、。，．・：；？！）」』】》〉’”…ー々")  # never at the beginning of a line
_JOINER = "\u200d"  # makes one emoji of two


class WordWrap:
    """Lay out words on `console`, and show them at every `flush`.

    `indent`: a text and its style, written before each line that the terminal's edge, not the text, has begun.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.indent: tuple[str, str] = ("", "")
        self.column = 0
        self._spaces: list[tuple[str, str]] = []
        self._ready: list[tuple[str, str]] = []  # lines and words, to be shown
        self._word: list[tuple[str, str]] = []  # not written yet: the next piece may belong to it

    def write(self, text: str, style: str = "") -> None:
        """Take in `text`; its last word is written when the text behind the word tells that the word has ended."""
        for piece in _PIECES.findall(text):
            if piece == "\n":
                self.end_line()
            elif piece[0] in " \t":
                self._end_word()
                self._spaces.append((piece.replace("\t", _TAB), style))
            else:
                for unit in units(piece):
                    if self._word and (_wide(unit) or _wide(self._word[-1][0])) and unit[0] not in _STAYS:
                        self._end_word()
                    self._word.append((unit, style))

    def end_line(self) -> None:
        """Write the text that waits, and a newline."""
        self._end_word()
        self._spaces.clear()
        self._ready.append(("\n", ""))
        self.column = 0

    def close(self) -> None:
        """Write the text that waits, and a newline where the last line has none."""
        self._end_word()
        if self.column:
            self.end_line()
        self.flush()

    def verbatim(self, line: str, style: str = "") -> None:
        """Write a line as it is, whatever its length: code that is copied must not have other newlines."""
        self._end_word()
        self._ready += [(line, style), ("\n", "")]
        self.column = 0

    def _end_word(self) -> None:
        if not self._word:
            return
        width, taken = self.console.width, sum(cell_len(text) for text, _ in self._word)
        before, self._spaces = self._spaces, []
        column = self.column + sum(cell_len(text) for text, _ in before)
        indent = self.indent if 2 * cell_len(self.indent[0]) <= width else ("", "")
        if column + taken > width and self.column > cell_len(indent[0]):
            before = [("\n", ""), indent]
            column = cell_len(indent[0])
        self._ready += [*before, *self._word]
        column += taken
        # A word longer than a line: the terminal breaks it, and it is copied in one piece.
        self.column, self._word = column if column <= width else (column - 1) % width + 1, []

    def flush(self) -> None:
        """Show all that was written so far, at once: a print costs the console more than a word."""
        if self._ready:
            self.console.print(Text.assemble(*self._ready), end="", soft_wrap=True, highlight=False)
            self._ready = []


def units(word: str) -> Iterator[str]:
    """Cut `word` where a line may end: on both sides of a character of two cells with the marks that belong to it."""
    unit = ""
    for character in word:
        cells = cell_len(character)
        if unit and (cells == 0 or unit[-1] == _JOINER or character in _STAYS):
            unit += character
        elif unit and (cells == 2 or _wide(unit)):
            yield unit
            unit = character
        else:
            unit += character
    if unit:
        yield unit


def _wide(unit: str) -> bool:
    return cell_len(unit[0]) == 2
