"""The conversation: its commands, its memory, and what happens when it is interrupted."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run
from eval.chat import Chat
from eval.cli import Settings
from eval.metrics import Run
from eval.session import Session, open_session
from tests.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = make_folder(tmp_path_factory.mktemp("tiny"))
    with threads_restored():
        yield open_session(Settings(model=str(folder), device="cpu", threads=1, max_new_tokens=8))


@pytest.fixture
def chat(session: Session) -> Chat:
    session.settings = Settings(model=session.settings.model, device="cpu", threads=1, max_new_tokens=8)
    return Chat(session, Console(file=io.StringIO(), width=80))


def said(chat: Chat) -> str:
    text: str = chat.console.file.getvalue()
    return text


def test_the_model_sees_the_whole_conversation(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    honest = Session.run

    def noting(self: Session, ids: Any, **options: Any) -> Run:
        seen.append(self.tokenizer.decode(ids[0]))
        return honest(self, ids, **options)

    monkeypatch.setattr(Session, "run", noting)
    for line in ("/system be kind", "hello", "again"):
        assert chat.line(line)
    first = chat.messages[1]["content"]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert seen == [
        "<bos>be kind<eos><bos>hello<eos><bos>",
        f"<bos>be kind<eos><bos>hello<eos><bos>{first}<eos><bos>again<eos><bos>",
    ]
    chat.line("/system")
    chat.line("/reset")
    chat.line("third")
    assert seen[2] == "<bos>third<eos><bos>"


def test_answers_are_streamed_and_kept(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.line("hello")
    assert capsys.readouterr().out.strip() == chat.messages[-1]["content"]
    assert chat.messages[-1]["content"] == chat.session.text(chat.runs[0].tokens).strip()
    assert "8 tokens in" in said(chat)


def test_drafting_is_switched(chat: Chat) -> None:
    chat.line("/draft off")
    chat.line("aaaa aaaa aaaa")
    assert chat.runs[-1].stats.drafted == 0
    chat.line("/draft 3")
    assert chat.session.settings.draft_length == 3
    chat.line("/reset")
    chat.line("aaaa aaaa aaaa")
    assert set(chat.runs[-1].stats.draft_lengths) <= {0, 1, 2, 3}
    chat.line("/draft on")
    assert chat.session.settings.draft_length == "adaptive"
    chat.line("/draft sideways")
    assert "/draft: say on, off or a number of tokens, not 'sideways'" in said(chat)
    assert "drafting: off" in said(chat)
    assert "drafting: suffix, 3" in said(chat)
    assert "drafting: suffix, adaptive" in said(chat)


def test_sampling_is_set_and_repeatable(chat: Chat) -> None:
    texts = []
    for _ in range(2):
        for line in ("/temperature 1.5", "/seed 7", "/reset", "hello"):
            chat.line(line)
        texts.append(chat.messages[-1]["content"])
    assert texts[0] == texts[1]
    chat.line("/seed 8")
    chat.line("/reset")
    chat.line("hello")
    assert chat.messages[-1]["content"] != texts[0]
    for line in ("/temperature -1", "/temperature warm", "/temperature", "/seed 1.5"):
        chat.line(line)
    assert chat.session.settings.temperature == 1.5
    for complaint in ("must be 0 (greedy) or more", "'warm' is not a number", "'1.5' is not a whole number"):
        assert complaint in said(chat)


def test_statistics(chat: Chat) -> None:
    chat.line("/stats")
    assert "no answers yet" in said(chat)
    chat.line("abcabcabcabc")
    chat.line("/stats")
    assert "last answer: 8 tokens" in said(chat)
    assert "all 1: 8 tokens" in said(chat)


def test_help_unknown_empty_and_quit(chat: Chat) -> None:
    assert chat.line("/help")
    assert chat.line("/dance")
    assert chat.line("   ")
    assert not chat.line("/quit")
    assert "there is no /dance; /help lists the commands" in said(chat)
    for command in chat.commands:
        assert command == "/help" or command in said(chat)
    assert not chat.messages


def test_ctrl_c_keeps_the_part_that_came(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.line("one")
    whole = list(chat.messages)
    from specdec.model.decoder import Decoder

    honest, passes = Decoder.forward_many, []

    def interrupted(self: Decoder, *arguments: Any) -> Any:
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return honest(self, *arguments)

    monkeypatch.setattr(Decoder, "forward_many", interrupted)
    assert chat.line("two")
    monkeypatch.undo()
    assert "(stopped)" in said(chat)
    assert chat.messages[:2] == whole
    assert chat.messages[2] == {"role": "user", "content": "two"}
    assert 0 < len(chat.messages[3]["content"]) < 8
    chat.line("three")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_a_conversation_that_outgrows_the_context_says_so(chat: Chat) -> None:
    chat.line("hello")
    chat.line("x" * 9000)
    assert "the model's context is 8192; /reset starts anew" in " ".join(said(chat).split())
    assert len(chat.messages) == 2
    chat.line("again")
    assert len(chat.messages) == 4


def test_a_base_model_does_not_converse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path, chat=False)
    with threads_restored():
        assert run.main(["chat", "--model", str(folder), "--device", "cpu", "--threads", "1"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_lines_come_from_a_pipe(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/stats\n"))
    arguments = ["--model", session.settings.model, "--device", "cpu", "--threads", "1", "--max-new-tokens", "5"]
    assert run.main(["chat", *arguments]) == 0
    output = capsys.readouterr().out
    assert "5 tokens in" in output
    assert "> " not in output


def test_a_conversation_is_saved_and_goes_on(chat: Chat, tmp_path: Path) -> None:
    file = str(tmp_path / "talk")
    chat.line(f"/save {file}")
    assert "no answers yet" in said(chat)
    for line in ("/system be kind", "hello", f"/save {file}"):
        assert chat.line(line)
    messages = list(chat.messages)
    chat.line("/reset")
    chat.line("/system")
    chat.session.model.conversations.forget()
    chat.line(f"/load {file}")
    assert (chat.messages, chat.system) == (messages, "be kind")
    chat.line("again")
    assert chat.runs[-1].stats.reused > 0
    for line, complaint in (
        ("/load", "name a file"),
        ("/load nowhere", "no such file"),
        ("/save /", "cannot be saved"),
    ):
        chat.line(line)
        assert complaint in said(chat).replace("\n", " ")
    chat.session.model.save_conversation(file)
    chat.line(f"/load {file}")
    assert "who said what" in said(chat).replace("\n", " ")
    assert len(chat.messages) == 4
