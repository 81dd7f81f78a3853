"""Answers on a terminal: words, Markdown in pieces of any length, control characters; and saved in one line."""

from __future__ import annotations

import io
import random

import pytest
from rich.cells import cell_len
from rich.console import Console

from eval.chat.view import LiveAnswer, Raw, Typeset, shorten, view_of
from eval.chat.wordwrap import units
from eval.live.dashboard import Dashboard
from specdec.util.text import visible

SAMPLE = """\
# A **bold** title

Here is a paragraph with **bold words that go on** and *italic*, `code **with** stars`, 2 * 3 = 6, 2**3 + 4**2, a \
snake_case_name and ~~gone~~. An unpaired ** here, and one `tick. Escaped \\*stars\\*, ***both***, \\(x*y*z\\).

1. First item that is long enough to wrap around the edge of this narrow terminal
2. Second
   - nested item, also long enough to wrap around the edge
- [link](http://example.com/an/address/that/does/not/fit/into/forty/columns) after

> A quotation that is long enough to be wrapped at the edge, too.

   ```python
   def f(x):  # a line of code that is longer than forty columns
       return x**2 * **y
   ```
```in a line``` is no fence.

| a | b |
|---|:-:|
| 1 | two words |
| 漢字 | x |

---
漢字のテストです。この行は長いので、途中で折り返されます。
The end"""
SET = """\
A bold title

Here is a paragraph with bold words that
go on and italic, code **with** stars, 2
* 3 = 6, 2**3 + 4**2, a snake_case_name
and gone. An unpaired ** here, and one
`tick. Escaped *stars*, both, \\(x*y*z\\).

1. First item that is long enough to
   wrap around the edge of this narrow
   terminal
2. Second
   • nested item, also long enough to
     wrap around the edge
• [link](http://example.com/an/address/that/does/not/fit/into/forty/columns)
  after

│ A quotation that is long enough to be
│ wrapped at the edge, too.

   ```python
   def f(x):  # a line of code that is longer than forty columns
       return x**2 * **y
   ```
in a line is no fence.

a     b
────  ─────────
1     two words
漢字  x

────────────────────────────────────────
漢字のテストです。この行は長いので、途中
で折り返されます。
The end
"""


def console(width: int = 40, **options: object) -> Console:
    return Console(file=io.StringIO(), width=width, **options)


def written(one: Console) -> str:
    text: str = one.file.getvalue()
    return text.replace("reading the prompt", "")


def typeset(pieces: list[str], one: Console) -> str:
    with Typeset(one) as view:
        for piece in pieces:
            view.feed(piece)
    return written(one)


@pytest.mark.parametrize("longest", [1, 3, 9, 10_000])
def test_markdown_is_the_same_in_pieces_of_any_length(longest: int) -> None:
    lengths, pieces, rest = random.Random(longest), [], SAMPLE
    while rest:
        length = lengths.randint(1, longest)
        pieces.append(rest[:length])
        rest = rest[length:]
    assert typeset(pieces, console()) == SET


def test_signs_become_styles() -> None:
    one = console(force_terminal=True, color_system="standard", _environ={"TERM": "xterm"})
    found = typeset(["**bold** `code`\n```\nx\n```"], one)
    assert "\x1b[1mbold\x1b[0m \x1b[36mcode\x1b[0m" in found
    assert "\x1b[36mx\x1b[0m\n" in found, "and nothing beside code that is copied"


@pytest.mark.parametrize("text", ["a **b", "a `b", "x * y", "* ", "#", "```", "```\ncode", "| a", "_", "a\\", "~~~"])
def test_what_has_no_partner_stays(text: str) -> None:
    assert typeset([*text], console()).rstrip("\n").replace("•", "*").rstrip() == text.rstrip()


def test_a_long_line_without_a_partner_does_not_wait_for_its_end() -> None:
    one = console()
    view = Typeset(one)
    view.feed("**" + "word " * 1000)
    assert written(one).count("word") > 500


def test_words_come_while_the_line_is_not_complete() -> None:
    one = console()
    view = Typeset(one)
    view.feed("one two ")
    assert written(one) == "one two"
    view.feed("three")
    view.feed("fo")
    assert written(one) == "one two"
    view.feed("ur ")
    assert written(one) == "one two threefour"


@pytest.mark.parametrize("width", [11, 20, 33])
def test_lines_are_never_wider_than_the_terminal(width: int) -> None:
    text = "a bc def ghijk lmnopqrstu 漢字かな交じり文、です。 👨‍👩‍👧 e\u0301te\u0301 x" * 3
    lines = typeset([text], console(width)).split("\n")
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert not any(line.startswith(("、", "。")) for line in lines)


def test_a_word_longer_than_a_line_stays_in_one_piece_and_the_next_follows_it() -> None:
    assert typeset(["see " + "x" * 22 + " a bb ccc"], console(10)) == "see\n" + "x" * 22 + " a bb\nccc\n"


def test_lines_may_end_beside_wide_characters_alone() -> None:
    assert list(units("ab漢字、cd👨‍👩‍👧e\u0301")) == ["ab", "漢", "字、", "cd", "👨‍👩‍👧", "e\u0301"]


def test_signs_of_markdown_have_ascii_forms() -> None:
    one = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=40)
    with Typeset(one) as view:
        view.feed("- item\n> said\n\n---\n")
    one.file.seek(0)
    assert one.file.read().replace("reading the prompt", "") == "- item\n| said\n\n" + "-" * 40 + "\n"


def test_control_characters_are_shown_and_not_obeyed() -> None:
    evil = "\x1b]0;title\x07 \x1b[31mred\x9b31m\r\nnext\x7f\ttab"
    assert visible(evil) == "␛]0;title␇ ␛[31mred\\x9b31m\nnext␡\ttab"
    for markdown in (True, False):
        one = console(force_terminal=True, _environ={"TERM": "xterm"})
        with view_of(one, None, markdown) as view:
            view.feed(evil)
        assert "\x1b]" not in written(one) and "\x1b[31m" not in written(one) and "␛[31mred" in written(one)
    in_pipe = console()
    with Raw(in_pipe) as view:
        view.feed(evil)
    assert written(in_pipe) == evil + "\n", "who reads a pipe gets the text as it is"


def test_the_dashboard_shows_control_characters_too() -> None:
    one = console(80, height=40, force_terminal=True, _environ={"TERM": "xterm"})
    live = LiveAnswer(one, Dashboard(lambda: None, lambda: (None, None)), Typeset)
    live.feed("\x1b[31mred")
    rows = one.render_lines(live.draw())
    assert any("␛[31mred" in segment.text for row in rows for segment in row)


def test_who_gets_which_view() -> None:
    terminal = console(force_terminal=True, _environ={"TERM": "xterm"})
    dumb = console(force_terminal=True, _environ={"TERM": "dumb"})
    dashboard = Dashboard(lambda: None, lambda: (None, None))
    assert isinstance(view_of(terminal, None, True), Typeset)
    assert isinstance(view_of(terminal, dashboard, True), LiveAnswer)
    assert all(isinstance(view_of(one, dashboard, True), Raw) for one in (dumb, console()))
    assert isinstance(view_of(terminal, None, False), Raw)


def test_long_texts_are_shortened_in_the_middle() -> None:
    assert shorten("a\n b") == "a b"
    found = shorten("x" * 300 + " end", 60)
    assert len(found) <= 60 and found.startswith("xxx") and found.endswith("x end") and " … " in found
