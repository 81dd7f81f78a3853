"""Turns: another answer, taking one back, answers that fail or are stopped, and conversations in files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval.chat.commands import Chat
from eval.cli.options import GenerationSettings
from eval.cli.session import Session, open_session
from tests.support.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = make_folder(tmp_path_factory.mktemp("tiny"))
    with threads_restored():
        yield open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=8))


@pytest.fixture
def chat(session: Session) -> Chat:
    session.settings = replace(session.settings, temperature=0.0, seed=0)
    return Chat(session, Console(file=io.StringIO(), width=200))


def said(chat: Chat) -> str:
    text: str = chat.turns.console.file.getvalue()
    return text


def contents(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.turns.messages]


def test_another_answer_takes_the_place_of_the_last_one(chat: Chat) -> None:
    for line in ("/temperature 1.5", "/seed 7", "one", "two"):
        chat.line(line)
    before = contents(chat)
    chat.line("/regenerate")
    first = contents(chat)
    chat.line("/regen")
    second = contents(chat)
    assert "(seed 8)" in said(chat) and "(seed 9)" in said(chat)
    assert before[:3] == first[:3] == second[:3]
    assert len({before[3], first[3], second[3]}) == 3
    for line in ("/undo", "two"):
        chat.line(line)
    assert contents(chat) == before, "a new question is asked with the seed itself"


def test_a_greedy_answer_comes_again_and_that_is_said(chat: Chat) -> None:
    chat.line("one")
    before = contents(chat)
    chat.line("/regenerate")
    assert "greedy decoding has one answer" in said(chat)
    assert contents(chat) == before and len(chat.turns.runs) == 2


def test_another_answer_without_a_seed_is_another(chat: Chat) -> None:
    chat.turns.session.settings = replace(chat.turns.session.settings, temperature=1.5, seed=None)
    chat.line("one")
    answers = {contents(chat)[1]}
    for _ in range(3):
        chat.line("/regenerate")
        answers.add(contents(chat)[1])
    assert len(answers) > 1 and len(contents(chat)) == 2


def test_turns_are_taken_back(chat: Chat) -> None:
    for line in ("/undo", "/regenerate"):
        chat.line(line)
        assert f"{line}: no answers yet" in said(chat)
    for line in ("one", "two", "/undo"):
        chat.line(line)
    assert contents(chat)[0] == "one" and len(contents(chat)) == 2
    assert "forgotten: two" in said(chat)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("out of memory"), "error: out of memory"),
        (OSError("no space left"), "error: no space left"),
        (KeyboardInterrupt(), "stopped before the first word"),
    ],
)
def test_a_turn_that_fails_leaves_the_conversation_as_it_was(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, error: BaseException, sentence: str
) -> None:
    chat.line("one")
    before = contents(chat)

    def failing(self: Session, ids: Any, streamer: Any, **options: Any) -> None:
        if not isinstance(error, KeyboardInterrupt):
            streamer.on_finalized_text("half an ")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Session, "run", failing)
        for line in ("two", "/regenerate"):
            assert chat.line(line)
            assert contents(chat) == before
    assert said(chat).count(sentence) == 2
    chat.line("three")
    assert len(contents(chat)) == 4


def test_errors_that_nobody_foresaw_leave_it_too(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chat.line("two")
    assert contents(chat) == []


def test_load_shows_where_one_was_and_goes_on(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for line in ("hello", "a long\nquestion " + "of many words " * 30, "/save ~/talk", "/save ~/talk"):
        chat.line(line)
    before = contents(chat)
    assert said(chat).count(f"saved in {tmp_path / 'talk'}") == 2, "a conversation of ours may be replaced"
    chat.line("/reset")
    chat.line("/load ~/talk")
    shown = said(chat).rpartition("4 messages")[2]
    assert "the last ones:\n> a long question of many" in shown and " … " in shown
    assert " ".join(before[3].split()) in " ".join(shown.split())
    chat.line("/save ~/again")
    assert (tmp_path / "again").is_file(), "also without a new answer"
    chat.line("/undo")
    assert contents(chat) == before[:2]


def test_files_that_are_not_ours_are_not_replaced(chat: Chat, tmp_path: Path) -> None:
    chat.line("hello")
    text, damaged, empty = tmp_path / "notes.txt", tmp_path / "other.safetensors", tmp_path / "empty"
    text.write_text("my notes")
    damaged.write_bytes(b"\xff" * 64)
    empty.touch()
    for file in (text, damaged):
        chat.line(f"/save {file}")
        assert f"{file}: holds something that is no conversation" in said(chat)
    assert text.read_text() == "my notes"
    chat.line(f"/save {empty}")
    assert f"saved in {empty}" in said(chat)
    for line in ("/save ~nobody-of-this-name/x", "/load ~nobody-of-this-name/x"):
        chat.line(line)
    assert said(chat).count("~nobody-of-this-name/x: ") == 2


@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": ["a", "b"]},
        {"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}], "system": 3},
    ],
)
def test_a_file_with_other_notes_is_refused(chat: Chat, tmp_path: Path, notes: dict[str, Any]) -> None:
    chat.line("hello")
    before = contents(chat)
    chat.turns.session.model.save_conversation(tmp_path / "talk", notes=notes)
    chat.line(f"/load {tmp_path / 'talk'}")
    assert "nobody says who said what" in said(chat)
    assert contents(chat) == before
