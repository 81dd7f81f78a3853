"""The command that measures texts decoded at once: what it says of them, and that it fails where it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.cli.output import DIFFERS
from eval.concurrency import main
from specdec.engine.sequence import Sequence
from specdec.engine.verify import Verdict


@pytest.fixture
def options(folder: Path) -> list[str]:
    few = ["--prompts", "4", "--max-new-tokens", "9", "--at-once", "1", "3", "--others", "2", "--drafter", "suffix"]
    return ["--model", str(folder), "--device", "cpu", "--threads", "1", *few]


def test_texts_at_once_are_what_they_are_alone(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joining = ["--join", "300", "--joins", "3"]
    assert main([*options, *joining, "--temperature", "0.7", "--json", str(tmp_path / "out")]) == 0
    record, told = json.loads((tmp_path / "out").read_text()), " ".join(capsys.readouterr().out.split())
    assert [(one["at_once"], one["identical"]) for one in record["together"]] == [(1, True), (3, True)]
    assert all(one["plain"] > 0 and one["drafted"] > 0 for one in record["together"])
    assert record["beside_others"] == {"others": 2, "identical": 4, "total": 4}
    joined = record["joined"]
    assert joined["tokens"] == 300 and len(joined["joins"]) == 3
    for one in joined["joins"]:
        assert one["longest_wait"] >= one["median_wait"] > 0 and one["ttft_beside"] > one["median_wait"]
        assert one["chunks"] == one["longest_wait"] / one["chunk"] and one["ttft_alone"] > 2 * one["chunk"]
    assert joined["chunks"] == sorted(one["chunks"] for one in joined["joins"])[1]
    assert f"ratio {joined['chunks']:.2f} (" in told and "a prompt of 300 tokens joins a text" in told


def test_a_text_that_differs_is_told(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Sequence.commit

    def wrong(self: Sequence, verdict: Verdict, states: object) -> None:
        commit(self, verdict, states)  # type: ignore[arg-type]
        if self.proposer is not None and self.length % 5 == 0:  # only where drafts are made
            self.tokens[self.length - 1] += 1

    monkeypatch.setattr(Sequence, "commit", wrong)
    assert main(options) == DIFFERS
