"""Markdown on a terminal while it is being written: headings, lists, quotes, bold, code, tables, line by line.

What: `MarkdownStream` takes text in pieces and hands styled words to `WordWrap`. Signs such as ** are left out where
they come in pairs; a sign without a partner stays as it is, so that nothing of the text is lost. Lines of code are
written unbroken and with nothing beside them, to be copied. Why not rich.markdown: it draws finished documents, and
pads every line to the terminal's width. Left out: links, pictures, HTML, formulas (written as they are), underlined
headings.
"""

from __future__ import annotations

import re
from itertools import zip_longest

from rich.cells import cell_len

from eval.chat.wordwrap import WordWrap

_FENCE = re.compile(r" *(`{3,}(?!.*`)|~{3,})")
_RULE = re.compile(r" {0,3}([-*_])( *\1){2,} *$")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+")
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+")
_QUOTE = re.compile(r" {0,3}> ?")
_FIRST_WORD = re.compile(r"[ \t]*[^ \t]+[ \t]+(?=[^ \t])")
_TABLE_RULE = re.compile(r" *\|?( *:?-+:? *\|)+( *:?-+:? *)?$")
_SIGN = re.compile(r"\\[*_`#]|`+|(?<![A-Za-z0-9_)\]*])\*{1,3}|(?<![\w_])_{1,3}|~{1,2}")  # 2**3 is no sign
_EDGE, _COLUMN = re.compile(r"^\||(?<!\\)\|$"), re.compile(r"(?<!\\)\|")
_GAP = "  "  # between the columns of a table
_LONGEST = 2000  # characters that a sign waits for its partner
_STYLES = {1: "italic", 2: "bold", 3: "bold italic"}
CODE, DIM = "cyan", "dim"


class MarkdownStream:
    """Write Markdown in pieces, of any length, onto `words`."""

    def __init__(self, words: WordWrap) -> None:
        self.words = words
        self._plain_signs = words.console.options.ascii_only
        self._pending = ""  # of the line that is being written
        self._last = ""  # character of that line which is written
        self._begun = False  # whether the kind of that line is known, and its beginning written
        self._style = ""  # of that line
        self._fence = ""  # what ends the code that the line is in
        self._table: list[str] = []

    def feed(self, text: str) -> None:
        """Take in the next piece, and write the part whose style is certain."""
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._line(line)
        self._pending = self._part(self._pending, complete=False)
        self.words.flush()

    def close(self) -> None:
        """Write the text that waits for more, as the text has ended."""
        if self._pending or self._begun:
            self._line(self._pending)
        self._pending = ""
        self._end_table()
        self.words.close()

    def _line(self, line: str) -> None:
        """Write the rest of a line, which ends here."""
        self._part(line, complete=True)
        self._begun, self._style, self._last, self.words.indent = False, "", "", ("", "")

    def _part(self, text: str, complete: bool) -> str:
        """Write the first part of `text`, or all if it is `complete`; return the text that waits."""
        if not self._begun:
            if self._whole_lines(text):
                if complete:
                    self._whole_line(text)
                return "" if complete else text
            if not complete and not _FIRST_WORD.match(text):
                return text
            self._end_table()
            text = self._beginning(text)
        rest = self._inline(text, self._style, complete, self._last)
        if done := len(text) - len(rest):
            self._last = text[done - 1]
        if complete:
            self.words.end_line()
        return rest

    def _whole_lines(self, text: str) -> bool:
        """Tell whether the line that begins with `text` is of a kind that is written whole."""
        return bool(self._fence or _FENCE.match(text) or _RULE.match(text) or text.lstrip(" ").startswith("|"))

    def _whole_line(self, line: str) -> None:
        found = _FENCE.match(line)
        if self._fence:
            ends = found is not None and found[1].startswith(self._fence) and not line[found.end() :].strip()
            self.words.verbatim(line, DIM if ends else CODE)
            self._fence = "" if ends else self._fence
        elif line.lstrip(" ").startswith("|"):
            self._table.append(line)
        elif found:
            self._end_table()
            self._fence = found[1]
            self.words.verbatim(line, DIM)
        else:
            self._end_table()
            self.words.verbatim(("-" if self._plain_signs else "─") * min(40, self.words.console.width), DIM)

    def _beginning(self, text: str) -> str:
        """Write the beginning of a line according to its kind; return the text behind it."""
        self._begun = True
        if found := _HEADING.match(text):
            self._style = "bold" if text.lstrip().startswith("###") else "bold underline"
            return text[found.end() :]
        if found := _ITEM.match(text):
            sign = found[2] if found[2][0].isdigit() or self._plain_signs else "•"
            self.words.write(f"{found[1]}{sign} ")
            self.words.indent = (" " * cell_len(f"{found[1].expandtabs(4)}{sign} "), "")
            return text[found.end() :]
        if found := _QUOTE.match(text):
            self._style, self.words.indent = "italic", ("| " if self._plain_signs else "│ ", DIM)
            self.words.write(*self.words.indent)
            return text[found.end() :]
        return text

    def _inline(self, text: str, style: str, complete: bool, before: str) -> str:
        """Write `text`, which comes after the character `before`, with its signs as styles.

        Return the text that waits for the partner of a sign.
        """
        text, at = before + text, len(before)
        while found := _SIGN.search(text, at):
            self.words.write(text[at : found.start()], style)
            sign, after = found.group(), found.end()
            waits = not complete and len(text) - found.start() < _LONGEST
            if sign[0] == "\\":
                self.words.write(sign[1], style)
                at = after
                continue
            if after == len(text) and waits:  # it may be the first half of a longer one
                return text[found.start() :]
            if partner := self._partner(sign, text, after):
                if partner.end() == len(text) and waits:
                    return text[found.start() :]
                inner = text[after : partner.start()]
                if sign[0] == "`":
                    self.words.write(inner, f"{style} {CODE}".strip())
                else:
                    own = "strike" if sign == "~~" else _STYLES[len(sign)]
                    self._inline(inner, f"{style} {own}".strip(), True, "")
                at = partner.end()
            elif waits and sign != "~" and (sign[0] == "`" or not text[after].isspace()):
                return text[found.start() :]
            else:
                self.words.write(sign, style)
                at = after
        end = len(text) - 1 if not complete and text.endswith("\\") else len(text)
        self.words.write(text[at:end], style)
        return text[end:]

    def _partner(self, sign: str, text: str, after: int) -> re.Match[str] | None:
        """Return the match that ends the style that `sign`, before text[after], has begun."""
        if sign == "~" or after == len(text) or (sign[0] != "`" and text[after].isspace()):
            return None
        one, exact = re.escape(sign[0]), re.escape(sign)
        if sign[0] == "`":
            pattern = rf"(?<!`){exact}(?!`)"
        else:
            beyond = r"(?!\w)" if sign[0] == "_" else ""
            pattern = rf"(?<![\s\\{one}]){exact}(?!{one}){beyond}"
        return re.compile(pattern).search(text, after + 1)

    def _end_table(self) -> None:
        """Write the table whose last line has come: in columns where they fit, else as it is."""
        lines, self._table = self._table, []
        rows = [[cell.strip() for cell in _COLUMN.split(_EDGE.sub("", line.strip()))] for line in lines]
        if len(lines) > 1 and _TABLE_RULE.match(lines[1]):
            shown = [rows[0], *rows[2:]]
            widths = [max(cell_len(cell) for cell in column) for column in zip_longest(*shown, fillvalue="")]
            if sum(widths) + len(_GAP) * (len(widths) - 1) <= self.words.console.width:
                lines = [_GAP.join(map(_padded, row, widths)).rstrip() for row in shown]
                self.words.verbatim(lines.pop(0), "bold")
                self.words.verbatim(_GAP.join(("-" if self._plain_signs else "─") * width for width in widths), DIM)
        for line in lines:
            self.words.verbatim(line)


def _padded(cell: str, width: int) -> str:
    return cell + " " * (width - cell_len(cell))
