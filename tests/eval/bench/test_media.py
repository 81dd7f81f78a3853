"""The bench of media: every kind is timed, a second question goes on from the first, and models are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import run
from eval.bench.media import CASES
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config
from tests.support.tiny_folder import make_folder


def test_media_are_timed_by_kind_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(full_size_config("gemma-4-tiny"), None, tmp_path / "model")
    words = ["bench", "--media", "--model", str(tmp_path / "model"), "--drafter", "none", "--threads", "1"]
    assert run.main([*words, "--repeat", "2", "--limit", "6", "--json", str(tmp_path / "record")]) == 0
    record = json.loads((tmp_path / "record").read_text())
    assert [row["name"] for row in record["media"]] == list(CASES)[:6]
    assert [row["soft_tokens"] for row in record["media"]] == [70, 140, 280, 560, 1120, 125]
    for row in record["media"]:
        assert row["prompt_tokens"] == row["soft_tokens"] + 4 + 20 + 2  # begin and end tokens
        assert all(len(row[name]) == 2 and min(row[name]) > 0 for name in ("first", "text", "second", "embedding"))
    largest = record["media"][4]
    assert largest["second_to_first"] < 0.5 and largest["median"]["embedding"] < largest["median"]["first"]
    out = capsys.readouterr().out
    assert "picture, 1120" in out and "first/text" in out


def test_what_cannot_be_timed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--media", "--model", str(make_folder(tmp_path / "model")), "--drafter", "none"]
    assert run.main(words) == 2
    assert ": the model takes no pictures and no sound; name one that does" in capsys.readouterr().err
    assert run.main([*words, "--suite"]) == 2
    assert "--media has prompts of its own" in capsys.readouterr().err
