"""What a terminal is shown holds no control characters of others, whatever it is printed with."""

from __future__ import annotations

import io

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from specdec.util.terminal import Terminal
from specdec.util.text import printable

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x00\x7f\x08z"


def test_only_line_ends_and_tabs_are_left() -> None:
    assert printable(HOSTILE) == "a[31mred]0;title2Jz"
    assert printable("two\r\nlines\tand é, 語, \U0001f600\n") == "two\nlines\tand é, 語, \U0001f600\n"


@pytest.mark.parametrize("made", [str, Text, Panel, lambda text: _table(text)])
def test_whatever_is_printed(made: type) -> None:
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=True, color_system=None, width=60)
    console.print(made(HOSTILE), markup=False)
    assert "a[31mred]0;title2Jz" in file.getvalue()
    console.out(made(HOSTILE) if made is str else "", highlight=False)
    assert not {c for c in file.getvalue() if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n"}


def _table(text: str) -> Table:
    table = Table("name")
    table.add_row(Text(text))
    return table


@pytest.mark.parametrize("name", ["ollama:a:latest", "m[2]/[red]x.gguf", "models [/old]/x.gguf", ":rocket:"])
def test_names_are_no_markup(name: str) -> None:
    file = io.StringIO()
    console = Terminal(file=file, width=60)
    console.print(name)
    console.print(_rows(name))
    assert file.getvalue().count(name) == 2


def _rows(text: str) -> Table:
    table = Table("name")
    table.add_row(text)
    return table
