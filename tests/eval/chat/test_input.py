"""What is typed: blocks, commands and messages, history on disk, editors."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run
from eval.chat import history as chat_history
from eval.chat.commands import Chat, Command, split
from eval.chat.history import FileHistory
from eval.chat.input import Lines, Typed, unquote, written_in_editor
from eval.cli.options import GenerationSettings
from tests.support.processes.echo_chat import EchoSession

COMMANDS: Mapping[str, Command] = {
    "/stats": Command(lambda _: None, "", ""),
    "/save": Command(lambda _: None, "FILE", ""),
    "/system": Command(lambda _: None, "[TEXT]", "", True),
    "/quit": Command(lambda _: None, "", ""),
}


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("plain", Typed("plain")),
        ('say """', Typed('say """')),
        ('"""', None),
        ('"""a', None),
        ('"""a\nb', None),
        ('"""a\nb"""', Typed("a\nb", True)),
        ('"""\n /reset\n\nb\n""" ', Typed(" /reset\n\nb", True)),
        ('"""a"""', Typed("a", True)),
        ('/system """be\nkind"""', Typed("/system be\nkind")),
        ('/system """', None),
        ('"""Docs."""\nimport x', Typed('"""Docs."""\nimport x', True)),
    ],
)
def test_blocks(text: str, typed: Typed | None) -> None:
    assert unquote(text) == typed


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hello", ("", "hello")),
        ("/stats", ("/stats", "")),
        ("/STATS ", ("/stats", "")),
        ("/save\ta b", ("/save", "a b")),
        ("/exit", ("/quit", "")),
        ("/system be\nkind", ("/system", "be\nkind")),
        ("/stats\nmore", ("", "/stats\nmore")),
        ("/usr/lib/x is what?", ("", "/usr/lib/x is what?")),
        ("/2 is what?", ("", "/2 is what?")),
        ("/ is the root", ("", "/ is the root")),
        ("//stats", ("", "//stats")),
    ],
)
def test_commands_and_messages(text: str, found: tuple[str, str]) -> None:
    assert split(text, COMMANDS) == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("/sats", "there is no /sats; did you mean /stats?"),
        ("/sys x", "there is no /sys; did you mean /system?"),
        ("/dance", "there is no /dance; /help lists the commands, and //dance sends it as a message"),
        ("/stats of France", "takes nothing behind it; //stats ... sends it as a message"),
    ],
)
def test_what_is_no_command_is_told(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        split(text, COMMANDS)


@pytest.fixture
def chat() -> Chat:
    return Chat(EchoSession(GenerationSettings(model="echo")), Console(file=io.StringIO(), width=200))


def heard(chat: Chat) -> list[str]:
    return [json.loads(m["content"].partition(": ")[2]) for m in chat.turns.messages if m["role"] == "assistant"]


def test_the_model_gets_messages_and_never_commands(chat: Chat) -> None:
    for typed in ("//help", "// a comment", "/usr/bin is?", "/dance", Typed("/help", True), "a\n/help", "a\udce9"):
        assert chat.line(typed)
    assert heard(chat) == ["/help", "// a comment", "/usr/bin is?", "/help", "a\n/help"]


def test_the_end_of_a_pipe_ends_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('"""a\nb'))
    reader = Lines(False)
    assert reader.read() == Typed("a\nb", True)
    with pytest.raises(EOFError):
        reader.read()


def test_history_is_private_whole_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_history, "MOST", 10)
    file = tmp_path / "folder" / "history"
    first = FileHistory(file)
    assert first.load_history_strings() == []
    for text in ("one", "two\nlines", "two\nlines", "  ", "sur\udce9", "x" * 60_000):
        first.store_string(text)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert FileHistory(file).load_history_strings() == ["sur\udce9", "two\nlines", "one"]
    with file.open("a") as damaged:
        damaged.write('{"not": "text"}\n"half\n')
    for i in range(20):
        first.store_string(f"more {i}")
    assert FileHistory(file).load_history_strings() == [f"more {i}" for i in range(19, 14, -1)]
    assert len(file.read_text().splitlines()) == 5
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["folder", "file/below", "\0"])
def test_a_history_that_cannot_be_kept_is_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    history = FileHistory(tmp_path / name)
    assert history.load_history_strings() == []
    history.store_string("hello")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.chat.input.sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("eval.cli.terminal._attributes", lambda: None)
    monkeypatch.delenv("VISUAL", raising=False)


def editor(folder: Path, script: str) -> str:
    file = folder / "an editor"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"'{file}' -x"


@pytest.mark.usefixtures("terminal")
def test_an_editor_gets_the_message_and_gives_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITOR", editor(tmp_path, f'test "$1" = -x && cp "$2" "{tmp_path}/got" && echo more >> "$2"'))
    assert written_in_editor("a\nb\n") == "a\nb\nmore"
    assert (tmp_path / "got").read_text() == "a\nb\n"
    monkeypatch.setenv("EDITOR", editor(tmp_path, "true"))
    assert written_in_editor("as it was") == ""


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("script", "sentence"), [("exit 3", "ended with status 3"), (r"printf '\377' > $2", "cannot be read")]
)
def test_an_editor_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, sentence: str
) -> None:
    monkeypatch.setenv("EDITOR", editor(tmp_path, script))
    with pytest.raises(ValueError, match=sentence):
        written_in_editor("")


@pytest.mark.usefixtures("terminal")
def test_a_missing_editor_is_told(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITOR", "no-such-editor --wait")
    assert chat.line("/edit")
    monkeypatch.setenv("EDITOR", "'")
    assert chat.line("/edit")
    monkeypatch.setenv("EDITOR", "")
    monkeypatch.setenv("PATH", "")
    assert chat.line("/edit")
    said = chat.turns.console.file.getvalue()
    assert "$EDITOR names no-such-editor, which is not installed" in said
    assert "cannot be understood" in said and "no editor was found" in said


@pytest.mark.usefixtures("terminal")
def test_edit_begins_with_the_last_message_and_sends_what_was_written(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITOR", editor(tmp_path, 'printf "/reset" >> "$2"'))
    for line in ("hello", "/edit", "/edit new"):
        chat.line(line)
    assert heard(chat) == ["hello", "hello/reset", "new/reset"]


def test_loading_is_said_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch" in sys.modules, "of other tests; the command is tried in a process of its own"
    program = (
        "import sys, run, eval.cli.terminal\n"
        "def told(name):\n"
        "    heavy = [m for m in ('torch', 'transformers', 'prompt_toolkit') if m in sys.modules]\n"
        "    print(name, heavy)\n"
        "    raise ValueError('enough')\n"
        "eval.cli.terminal.say_loading = told\n"
        "for words in (['chat'], ['generate', 'x'], ['bench'], ['train', '--out', 'none', '--minutes', '1']):\n"
        "    run.main([*words, '--model', 'gemma-3-270m'])\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == 4 * "gemma-3-270m []\n"


def test_options_reach_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def noted(*arguments: Any) -> int:
        taken.append(arguments[1:])
        return 0

    monkeypatch.setattr("eval.chat.command.chat", noted)
    other = ["chat", "--plain", "--no-history", "--dashboard", "--image-tokens", "1120", "--frames", "8"]
    other += ["--learn", "--learn-limit", "2MB"]
    assert run.main(["chat"]) == run.main(other) == 0
    assert taken == [(False, True, True, None, None, None), (True, False, False, 1120, 8, 2_000_000)]


def test_no_home_means_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    from eval.chat.command import _history_file

    def nobody() -> Path:
        raise RuntimeError("no home")

    for name in ("SPECDEC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert _history_file() is None
    monkeypatch.setenv("SPECDEC_CACHE", os.devnull)
    assert _history_file() == Path(os.devnull) / "chat-history"
