"""`python -m eval.from_use`: its prompts, and all of it on a tiny model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import run
from eval.from_use.command import main
from eval.from_use.prompts import PROMPTS, one_persons_prompts
from tests.support.tiny_folder import make_folder, threads_restored


def test_prompts_are_of_24_kinds_and_all_different() -> None:
    prompts = one_persons_prompts()
    assert len({prompt.turns for prompt in prompts}) == len(prompts) == PROMPTS
    assert Counter(Counter(prompt.task for prompt in prompts).values()) == {10: 24}
    other = one_persons_prompts(1)
    assert other != prompts and {prompt.name for prompt in other} == {prompt.name for prompt in prompts}


def test_answers_training_and_both_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with threads_restored():
        folder = make_folder(tmp_path / "tiny", "llama")
        model = ["--model", str(folder), "--device", "cpu", "--threads", "1"]
        lines = tmp_path / "prompts.jsonl"
        lines.write_text("\n".join(json.dumps({"prompt": f"Say the number {i} in words."}) for i in range(99)))
        sizes = ["--tokens", "300", "--steps", "2", "--max-new-tokens", "9", "--data", str(lines)]
        first = ["--out", str(tmp_path / "first"), "--draft-length", "2", "--draft-vocab", "64"]
        assert run.main(["train", *model, *first, *sizes]) == 0
        out, record = tmp_path / "out", tmp_path / "out.json"
        training = f"--steps 2 --tokens 100 --data {lines} --start {tmp_path / 'first'}"
        words = ["--out", str(out), *model, "--learn", "24", "--ask", "2", "--foreign", "2", "--draft-length", "2"]
        words += ["--max-new-tokens", "100", "--train", training, "--json", str(record)]
        assert main(words) == 0
        found = json.loads(record.read_text())
        assert found["learned"]["prompts"] == 24 and found["learned"]["answer_tokens"] >= 2000
        assert (found["own"]["prompts"], found["foreign"]["prompts"], found["kinds"]) == (2, 2, 24)
        lengths = [found["own"][when]["mean_acceptance_length"] for when in ("before", "after")]
        assert min(lengths) >= 1 and found["own"]["gain"] == pytest.approx(lengths[1] / lengths[0] - 1)
        assert found["heads"]["after"] == str(out / "head") and (out / "head" / "mtp.gguf").is_file()
        kept = sorted(path.name for path in (out / "use").rglob("*.json"))
        assert main(words) == 0, "what was done already is not done again"
        assert sorted(path.name for path in (out / "use").rglob("*.json")) == kept and len(kept) == 25
        assert json.loads(record.read_text())["own"] == found["own"]
        capsys.readouterr()
        assert main([*words, "--learn", "239"]) == 2 and "there are 240 prompts" in capsys.readouterr().err
