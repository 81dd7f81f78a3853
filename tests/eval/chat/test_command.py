"""The conversation: its commands, its memory, and what happens when it is interrupted."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run
from eval.chat.commands import Chat
from eval.chat.view import LiveAnswer, Raw
from eval.cli.metrics import TimedRun
from eval.cli.options import GenerationSettings
from eval.cli.session import Session, open_session
from specdec import Round
from tests.support.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = make_folder(tmp_path_factory.mktemp("tiny"))
    with threads_restored():
        yield open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=8))


@pytest.fixture
def chat(session: Session) -> Chat:
    session.settings = GenerationSettings(model=session.settings.model, device="cpu", threads=1, max_new_tokens=8)
    return Chat(session, Console(file=io.StringIO(), width=80))


@pytest.fixture
def terminal(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """A chat with the dashboard on a terminal of 80 by 24."""
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    return Chat(chat.turns.session, console, dashboard=True, markdown=False)


def said(chat: Chat) -> str:
    text: str = chat.turns.console.file.getvalue()
    return text


def test_the_model_sees_the_whole_conversation(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    honest = Session.run

    def noting(self: Session, ids: Any, **options: Any) -> TimedRun:
        seen.append(self.tokenizer.decode(ids[0]))
        return honest(self, ids, **options)

    monkeypatch.setattr(Session, "run", noting)
    for line in ("/system be kind", "hello", "again"):
        assert chat.line(line)
    first = chat.turns.messages[1]["content"]
    assert [m["role"] for m in chat.turns.messages] == ["user", "assistant"] * 2
    assert seen == [
        "<bos>be kind<eos><bos>hello<eos><bos>",
        f"<bos>be kind<eos><bos>hello<eos><bos>{first}<eos><bos>again<eos><bos>",
    ]
    chat.line("/system")
    chat.line("/reset")
    chat.line("third")
    assert seen[2] == "<bos>third<eos><bos>"


def test_answers_are_streamed_and_kept(chat: Chat) -> None:
    chat.line("hello")
    assert said(chat).startswith(chat.turns.messages[-1]["content"] + "\n")
    assert chat.turns.messages[-1]["content"] == chat.turns.session.text(chat.turns.runs[0].tokens).strip()
    assert "8 tokens in" in said(chat)


def test_drafting_is_switched(chat: Chat) -> None:
    chat.line("/draft off")
    chat.line("aaaa aaaa aaaa")
    assert chat.turns.runs[-1].stats.drafted == 0
    chat.line("/draft 3")
    assert chat.turns.session.settings.draft_length == 3
    chat.line("/reset")
    chat.line("aaaa aaaa aaaa")
    assert set(chat.turns.runs[-1].stats.draft_lengths) <= {0, 1, 2, 3}
    chat.line("/draft on")
    assert chat.turns.session.settings.draft_length == "adaptive"
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
        texts.append(chat.turns.messages[-1]["content"])
    assert texts[0] == texts[1]
    chat.line("/seed 8")
    chat.line("/reset")
    chat.line("hello")
    assert chat.turns.messages[-1]["content"] != texts[0]
    for line in ("/temperature -1", "/temperature warm", "/temperature", "/seed 1.5"):
        chat.line(line)
    assert chat.turns.session.settings.temperature == 1.5
    for complaint in ("must be 0 (greedy) or more", "'warm' is not a number", "'1.5' is not a whole number"):
        assert complaint in said(chat)


def test_statistics(chat: Chat) -> None:
    chat.line("/stats")
    assert "no answers yet" in said(chat)
    chat.line("abcabcabcabc")
    chat.line("/stats")
    assert "last answer: 8 tokens" in said(chat)
    assert "all 1: 8 tokens" in said(chat)


def test_a_model_without_adapters_says_so(chat: Chat) -> None:
    chat.line("/adapter")
    chat.line("/adapter nope")
    assert "adapter: none (the model has none; --adapter adds one)" in said(chat)
    assert "there is no adapter 'nope'; the model has none" in said(chat)


def test_help_unknown_empty_and_quit(chat: Chat) -> None:
    assert chat.line("/help")
    assert chat.line("/dance")
    assert chat.line("   ")
    assert not chat.line("/quit")
    assert "there is no /dance; /help lists the commands" in said(chat)
    for command in chat.commands:
        assert command == "/help" or command in said(chat)
    assert not chat.turns.messages


def interrupt_fifth_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.model.decoder import Decoder

    honest, passes = Decoder.forward_many, []

    def interrupted(self: Decoder, *arguments: Any) -> Any:
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return honest(self, *arguments)

    monkeypatch.setattr(Decoder, "forward_many", interrupted)


def test_ctrl_c_keeps_the_part_that_came(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.line("one")
    whole = list(chat.turns.messages)
    interrupt_fifth_pass(monkeypatch)
    assert chat.line("two")
    monkeypatch.undo()
    assert "(stopped)" in said(chat)
    assert chat.turns.messages[:2] == whole
    assert chat.turns.messages[2] == {"role": "user", "content": "two"}
    assert 0 < len(chat.turns.messages[3]["content"]) < 8
    chat.line("three")
    assert [m["role"] for m in chat.turns.messages] == ["user", "assistant"] * 3


def test_a_conversation_that_outgrows_the_context_says_so(chat: Chat) -> None:
    chat.line("hello")
    chat.line("x" * 9000)
    heard = " ".join(said(chat).split())
    assert "the model's context is 8192; /undo takes the last turn back, /reset starts anew" in heard
    assert len(chat.turns.messages) == 2
    chat.line("again")
    assert len(chat.turns.messages) == 4


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
    messages = list(chat.turns.messages)
    chat.line("/reset")
    chat.line("/system")
    chat.turns.session.model.conversations.forget()
    chat.line(f"/load {file}")
    assert (chat.turns.messages, chat.turns.system) == (messages, "be kind")
    chat.line("again")
    assert chat.turns.runs[-1].stats.reused > 0
    for line, complaint in (
        ("/load", "name a file"),
        ("/load nowhere", "no such file"),
        ("/save /", "cannot be saved"),
    ):
        chat.line(line)
        assert complaint in said(chat).replace("\n", " ")
    chat.turns.session.model.save_conversation(file)
    chat.line(f"/load {file}")
    assert "who said what" in said(chat).replace("\n", " ")
    assert len(chat.turns.messages) == 4


def test_the_dashboard_follows_answers_as_lines_where_no_terminal_is(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("aaaa aaaa\n/dashboard off\nhello\n"))
    arguments = ["--model", session.settings.model, "--device", "cpu", "--threads", "1", "--max-new-tokens", "5"]
    assert run.main(["chat", "--dashboard", *arguments]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "\x1b" not in output and output.count("tokens/s: ") == 1
    first = next(i for i, line in enumerate(lines) if line.startswith("tokens/s: "))
    assert "5 tokens in" in lines[first - 2] and "cut after 5 tokens" in lines[first - 1]
    assert [line.partition(":")[0] for line in lines[first : first + 7]] == [
        "tokens/s",
        "tokens per round",
        "accepted by position",
        "a round",
        "V(1) to V(9)",
        "rounds by draft length",
        "memory",
    ]


def test_the_dashboard_is_drawn_while_an_answer_comes_which_stays_as_text(
    terminal: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.turns.session.settings = replace(terminal.turns.session.settings, max_new_tokens=80, memory_budget="9GB")
    for line in ("/reset", "aaaa aaaa aaaa", "/draft off", "again"):
        assert terminal.line(line)
    assert capsys.readouterr().out == ""
    live, _, kept = said(terminal).rpartition("\x1b[2K")
    answer = terminal.turns.messages[-1]["content"]
    assert "overall" in live
    kept = kept.removeprefix("\x1b[?25h")  # the cursor
    assert kept.startswith(terminal.turns.session.text(terminal.turns.runs[-1].tokens)) and kept.count(answer) == 1
    assert kept.index("80 tokens in") < kept.index("overall") and "of 9.00 GB" in kept
    counted = terminal.turns.dashboard.figures().stats
    assert counted.rounds == sum(one.stats.rounds for one in terminal.turns.runs) > 79
    assert counted.draft_sources == terminal.turns.runs[0].stats.draft_sources
    assert counted.decode_tokens_per_second > 0
    terminal.line("/reset")
    assert terminal.turns.dashboard.figures().stats.rounds == 0


def test_ctrl_c_leaves_the_terminal_usable(terminal: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = sys.stdout
    interrupt_fifth_pass(monkeypatch)
    assert terminal.line("two")
    monkeypatch.undo()
    part = terminal.turns.messages[-1]["content"]
    kept = said(terminal).rpartition("\x1b[2K")[2]
    assert 0 < len(part) < 8
    assert kept.index(part) < kept.index("(stopped)") < kept.index("overall")
    assert said(terminal).rfind("\x1b[?25h") > said(terminal).rfind("\x1b[?25l"), "the cursor is back"
    assert sys.stdout is stdout
    assert terminal.line("three") and len(terminal.turns.messages) == 4


def test_errors_come_without_a_dashboard(terminal: Chat) -> None:
    terminal.line("x" * 9000)
    assert "the model's context is 8192" in said(terminal) and "overall" not in said(terminal)


@pytest.mark.parametrize(("width", "height"), [(80, 50), (80, 24), (60, 19), (80, 18), (40, 24), (80, 6), (80, 2)])
def test_no_frame_is_higher_than_the_terminal(session: Session, width: int, height: int) -> None:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, _environ={"TERM": "xterm"})
    one = Chat(session, console, dashboard=True)
    heights = set()
    for text in ("", "a word", "many words " * 40, "many words " * 400, "lines\n" * 50):
        answer = LiveAnswer(console, one.turns.dashboard, Raw)
        answer.feed(text)
        heights.add(len(console.render_lines(answer.draw())))
        one.turns.dashboard.on_round(Round(("mtp",) * 4, 2, 3, 0.01, 0.02, 0.003))
    assert len(heights) == 1 and heights.pop() < height
    one.line("hello")
    assert "tokens in" in said(one) and "..." not in said(one)


def test_a_dumb_terminal_gets_lines(session: Session) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, _environ={"TERM": "dumb"})
    dumb = Chat(session, console, dashboard=True)
    dumb.line("hello")
    assert "tokens/s: " in said(dumb) and "\x1b[2K" not in said(dumb)


def test_the_dashboard_is_switched(chat: Chat) -> None:
    chat.line("hello")
    for line in ("/dashboard", "/dashboard on", "again", "/dashboard off", "third", "/dashboard up"):
        assert chat.line(line)
    assert said(chat).count("tokens/s: ") == 1
    assert "dashboard: on" in said(chat) and said(chat).count("dashboard: off") == 2
    assert "/dashboard: say on or off, not 'up'" in said(chat)
    counted = chat.turns.dashboard.figures().stats.rounds
    assert counted == sum(one.stats.rounds for one in chat.turns.runs), "also while it was off"
