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


def test_texts_at_once_are_what_they_are_alone(options: list[str], tmp_path: Path) -> None:
    assert main([*options, "--join", "300", "--temperature", "0.7", "--json", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out").read_text())
    assert [(one["at_once"], one["identical"]) for one in record["together"]] == [(1, True), (3, True)]
    assert all(one["plain"] > 0 and one["drafted"] > 0 for one in record["together"])
    assert record["beside_others"] == {"others": 2, "identical": 4, "total": 4}
    assert record["joined"]["tokens"] == 300 and record["joined"]["longest_wait"] > 0


def test_a_text_that_differs_is_told(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Sequence.commit

    def wrong(self: Sequence, verdict: Verdict, hidden: object) -> None:
        commit(self, verdict, hidden)  # type: ignore[arg-type]
        if self.proposer is not None and self.length % 5 == 0:  # only where drafts are made
            self.tokens[self.length - 1] += 1

    monkeypatch.setattr(Sequence, "commit", wrong)
    assert main(options) == DIFFERS
