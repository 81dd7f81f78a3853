"""The command that measures reuse: its turns reuse what they say, and it fails where it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.cli.options import GenerationSettings
from eval.cli.session import Session, open_session
from eval.conversations import Talk, main, soak


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return open_session(GenerationSettings(model=str(folder), device="cpu", threads=1))


def test_turns_reuse_what_came_before(session: Session) -> None:
    turns = {turn.name: turn for turn in Talk(session, document=700, answer=20, question=30).turns()}
    assert all(turn.identical for turn in turns.values())
    reused = {name: turn.reused for name, turn in turns.items()}
    first = 700 + 30
    assert turns["second turn"].tokens == first + 20 + 30
    assert reused["first turn"] == 0
    assert reused["second turn"] == reused["second turn, from a file"] == first + 20 - 1
    assert first < reused["the same again"] <= first + 20 + 30
    assert 700 - 320 < reused["another question"] < 700


def test_the_command_says_what_it_found(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--answer", "8", "--question", "9"]
    code = main([*options, "--document", "600", "--json", str(tmp_path / "out")])
    assert "{" not in capsys.readouterr().out
    record = json.loads((tmp_path / "out").read_text())
    assert [turn["identical"] for turn in record["turns"]] == [True] * 5
    # A tiny model's passes cost next to nothing, so that how much is saved is not known beforehand.
    slow = [turn for turn in record["turns"] if turn["name"].startswith("second turn") and turn["ratio"] > 0.1]
    assert code == int(bool(slow))
    assert main([*options, "--document", "9000"]) == 2
    assert "shorter --document" in capsys.readouterr().err


def test_a_soak_keeps_within_the_limit(session: Session) -> None:
    kept = session.model.conversations
    kept.forget()
    kept.limit = 4 * session.model.decoder.new_cache().nbytes
    for resident in soak(session, 12, longest=300):
        assert resident > 1e8
        assert kept.nbytes <= kept.limit
    assert kept.kept
    assert not torch.is_inference_mode_enabled()
