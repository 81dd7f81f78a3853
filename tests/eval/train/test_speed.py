"""`eval.train.speed`: three kinds of text, each collected and trained on; a server that sends what is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from drafter.data.server import AnswerServer, Reply
from drafter.prompts.files import TrainingPrompt
from eval.train import speed
from tests.support.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    with threads_restored():
        yield


def test_a_row_for_each_kind_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.train.texts.ends_of", lambda session: frozenset([session.tokenizer.eos_token_id]))
    replies = speed._replies
    # a random model's own words are often none of its tokenizer's
    monkeypatch.setattr(speed, "_replies", lambda *given: dict.fromkeys(replies(*given), "It is so."))
    model, documents = make_folder(tmp_path / "model", "llama"), tmp_path / "documents"
    documents.mkdir()
    for name in ("apple", "pear"):
        (documents / f"{name}.txt").write_text(
            " ".join(f"The {name} number {i} stands in the garden." for i in range(20))
        )
    out = tmp_path / "out.json"
    words = ["--model", str(model), "--device", "cpu", "--threads", "1", "--seconds", "1.5", "--max-new-tokens", "8"]
    assert speed.main([*words, "--texts", str(documents), "--json", str(out)]) == 0
    own, server, plain = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in (own, server, plain)] == [speed.OWN, speed.SERVER, speed.PLAIN]
    assert plain["texts"] >= 2
    for row in (own, server, plain):
        assert row["collected"] == pytest.approx(60 * row["tokens"] / row["seconds"])
        assert 0 < row["learned"] < min(row["collected"], row["trained"])
    shown = capsys.readouterr().out
    assert "against own" in shown and "this machine's share" in shown


def test_the_server_sends_what_was_answered_before() -> None:
    messages = [{"role": "user", "content": "Who?"}]
    with speed.replaying({json.dumps(messages): "Nobody."}) as address:
        server = AnswerServer(address)
        assert server.ask(TrainingPrompt("user", (("user", "Who?"),)), 5, 0.0, 0) == Reply("Nobody.", True)
