"""The chat as a person at a terminal meets it: keys, pastes, history over sessions, interrupts, other sizes."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.cli.options import DEFAULT_MODEL
from tests.support.processes.forked import python
from tests.support.processes.pseudo_terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_J, ENTER, TAB, UP, PseudoTerminal

ECHO = ("-m", "tests.support.processes.echo_chat")
READY = "leaves.\n"
DONE = "per round)\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def terminal(cache: Path) -> Iterator[PseudoTerminal]:
    """One session for many tests: starting takes seconds."""
    editor = cache / "editor"
    editor.write_text("#!/bin/sh\nprintf 'more\\n' >> \"$1\"\n")
    editor.chmod(0o755)
    with PseudoTerminal([*python(), *ECHO], {"SPECDEC_CACHE": str(cache), "VISUAL": str(editor)}) as one:
        before = one.until(READY)
        assert before.startswith(f"loading {DEFAULT_MODEL}\n")
        yield one


def test_enter_sends_and_what_is_pasted_is_one_message(terminal: PseudoTerminal) -> None:
    terminal.keys("hello" + ENTER)
    assert 'heard 1: "hello"' in terminal.until(DONE)
    terminal.paste("/reset\n  two\n\nthree")
    terminal.keys(" and four" + ENTER)
    assert r'"/reset\n  two\n\nthree and four"' in terminal.until(DONE)


def test_keys_for_another_line_and_blocks(terminal: PseudoTerminal) -> None:
    terminal.keys(f"one{ALT_ENTER}two{CTRL_J}three{ENTER}")
    assert r'"one\ntwo\nthree"' in terminal.until(DONE)
    terminal.keys(f'"""{ENTER}/a{ENTER}b{ENTER}"""{ENTER}')
    assert r'"/a\nb"' in terminal.until(DONE)
    terminal.keys(f"/usr/lib/x is what?{ENTER}")
    assert '"/usr/lib/x is what?"' in terminal.until(DONE)


def test_what_is_typed_or_pasted_during_an_answer_waits_unseen(terminal: PseudoTerminal) -> None:
    terminal.keys("slowly" + ENTER)
    terminal.until("word3")
    terminal.paste("typed\nahead")
    terminal.keys(ENTER)
    assert "typed" not in terminal.until("word40 ")
    assert r'"typed\nahead"' in terminal.until(DONE) + terminal.until(DONE)


def test_ctrl_c_stops_an_answer_clears_the_line_and_leaves_nothing_broken(terminal: PseudoTerminal) -> None:
    terminal.keys("slowly" + ENTER)
    terminal.until("word3")
    terminal.keys(CTRL_C)
    assert "Traceback" not in terminal.until("\n(stopped)\n")
    terminal.until(">")
    terminal.keys("not this" + CTRL_C)
    terminal.until("(Ctrl-D or /quit leaves)\n")
    terminal.keys("this" + ENTER)
    assert '"this"' in terminal.until(DONE)


def test_the_arrows_bring_whole_messages_and_tab_completes(terminal: PseudoTerminal) -> None:
    terminal.keys(f"a{ALT_ENTER}b{ENTER}")
    terminal.until(DONE)
    terminal.keys(UP + ENTER)
    assert r'"a\nb"' in terminal.until(DONE)
    terminal.keys("/und" + TAB)
    terminal.until("/undo")
    terminal.keys(ENTER)
    terminal.until("forgotten: a b\n")


def test_an_editor_writes_a_message(terminal: PseudoTerminal) -> None:
    terminal.keys("/edit /draft" + ENTER)
    assert r'"/draftmore"' in terminal.until(DONE)


def test_no_word_is_broken_at_the_edge_whatever_the_width(terminal: PseudoTerminal) -> None:
    for columns in (40, 100):
        terminal.resize(columns)
        terminal.keys("slowly" + ENTER)
        terminal.until("word0")
        lines = ("word0" + terminal.until("word60 ")).splitlines()
        terminal.keys(CTRL_C)
        terminal.until("(stopped)\n")
        assert columns - 8 < max(map(len, lines)) <= columns
        assert " ".join(lines).split() == [f"word{i}" for i in range(61)]


def test_markdown_is_styled_and_switched_off(terminal: PseudoTerminal) -> None:
    terminal.keys("md" + ENTER)
    assert "Title\n\nSome bold and code.\n\n```\nx = 1\n```\n(" in terminal.until(DONE)
    terminal.keys("/markdown off" + ENTER)
    terminal.until("markdown: off\n")
    terminal.keys("md" + ENTER)
    assert "# Title\n\nSome **bold** and `code`." in terminal.until(DONE)
    terminal.keys("/markdown on" + ENTER)
    terminal.until("markdown: on\n")


def test_bytes_that_are_no_text_are_refused_with_a_sentence(terminal: PseudoTerminal) -> None:
    terminal.paste("caf\udce9")
    terminal.keys(ENTER)
    assert "no UTF-8 text" in terminal.until("no UTF-8 text")


def test_history_goes_on_in_the_next_session_and_ctrl_d_leaves(terminal: PseudoTerminal, cache: Path) -> None:
    terminal.keys(f"remember{ALT_ENTER}this{ENTER}")
    terminal.until(DONE + ">")
    terminal.keys(CTRL_D)
    assert terminal.status() == 0
    file = cache / "chat-history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with PseudoTerminal([*python(), *ECHO], {"SPECDEC_CACHE": str(cache)}) as second:
        second.until(READY)
        second.keys(UP + ENTER)
        assert r'heard 1: "remember\nthis"' in second.until(DONE + ">")
        second.keys("/quit" + ENTER)
        assert second.status() == 0


def test_a_history_that_cannot_be_kept_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with PseudoTerminal([*python(), *ECHO], {"SPECDEC_CACHE": str(tmp_path / "file")}) as one:
        one.until(READY)
        one.keys("hello" + ENTER)
        assert "Traceback" not in one.until(DONE + ">")
        one.keys(UP + ENTER)
        assert '"hello"' in one.until(DONE + ">")
        one.keys(CTRL_D)
        assert one.status() == 0


def test_a_dumb_terminal_reads_lines_and_blocks(tmp_path: Path) -> None:
    with PseudoTerminal([*python(), *ECHO], {"SPECDEC_CACHE": str(tmp_path), "TERM": "dumb"}) as one:
        one.until(READY)
        one.keys('"""one\ntwo\n"""\n')
        assert r'heard 1: "one\ntwo"' in one.until(DONE + ">")
        assert "\x1b" not in one.raw
        one.until_pressed(CTRL_C, "(Ctrl-D or /quit leaves)\n>")
        one.keys(CTRL_D)
        assert one.status() == 0
    assert not list(tmp_path.iterdir())


def test_a_pipe_holds_lines_blocks_and_bytes_that_are_refused_alone() -> None:
    lines = b'first\n"""\n/stats\nx\n"""\n\xff\xfe\n//help\n/system """be\nkind"""\n"""no\nend'
    found = subprocess.run([*python(), *ECHO], input=lines, capture_output=True, check=True)
    said = found.stdout.decode()
    heard = [line for line in said.splitlines() if line.startswith("heard")]
    assert heard == ['heard 1: "first"', r'heard 2: "/stats\nx"', 'heard 3: "/help"', r'heard 4: "no\nend"']
    assert "no UTF-8 text" in said and "the role is set" in said
    assert "\x1b" not in said and found.stderr == b""
