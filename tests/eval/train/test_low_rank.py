"""A LoRA made for an experiment, and the experiment: a head as it is, adapted, and from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import run
import specdec
from drafter.data.given import GivenText
from eval import follow
from eval.train.low_rank import ALPHA, RANK, restyle, train_adapter
from tests.support.tiny import prompt
from tests.support.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    with threads_restored():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"), "llama")


def test_a_style_by_rule() -> None:
    said = "Rivers are long. Some are wide!\n\n- **Danube**, in Europe\n2) Nile?\n---\n"
    assert restyle(said) == "1. RIVERS ARE LONG.\n2. SOME ARE WIDE!\n3. DANUBE**, IN EUROPE\n4. NILE?"
    assert restyle(" \n* ") == ""


def test_the_adapter_is_what_was_trained(folder: Path, tmp_path: Path) -> None:
    texts = [GivenText(prompt(20, seed=i)[0], 5) for i in range(40)]
    ticks = iter(range(1000))
    made = train_adapter(str(folder), texts, tmp_path / "lora", 0.5, lambda: float(next(ticks)))
    assert made.steps == 30 and made.last < made.first - 0.05, "it learns the texts"
    parts = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, up in parts.items():
            if name.endswith("lora_B.weight"):
                down = parts[name.replace("lora_B", "lora_A")]
                module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                model.get_submodule(module).weight += ALPHA / RANK * up @ down
        merged = model(input_ids=texts[0].tokens[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(merged[4:-1], texts[0].tokens[5:])
    assert float(loss) < made.first
    ours = specdec.load(str(folder), adapter=str(tmp_path / "lora"), drafter=None, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours(texts[0].tokens[None]).logits[0].float(), merged, rtol=1e-3, atol=1e-3)


def test_the_experiment(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafter.train.schedule.LEAST_ROWS", 50)
    head, out = tmp_path / "head", tmp_path / "out"
    model = ["--model", str(folder), "--device", "cpu", "--threads", "1"]
    sizes = ["--steps", "1", "--tokens", "300", "--max-new-tokens", "8", "--draft-vocab", "64"]
    assert run.main(["train", *model, "--out", str(head), *sizes]) == 0
    words = [*model, "--out", str(out), "--start", str(head), "--minutes", "0.2", "--lora-minutes", "0.02"]
    words += ["--answers", "4", "--limit", "1", "--max-new-tokens", "8", "--json", str(tmp_path / "out.json")]
    assert follow.main(words) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    lengths = [row["mean_acceptance_length"] for row in record["heads"]]
    assert [row["name"] for row in record["heads"]] == [follow.AS_IT_IS, follow.ADAPTED, follow.SCRATCH]
    assert record["prompts"] == 5 and all(1 <= length <= 5 for length in lengths)
    assert record["gains"][follow.AS_IT_IS] == pytest.approx(lengths[1] / lengths[0] - 1)
    assert record["gains"][follow.SCRATCH] == pytest.approx(lengths[1] / lengths[2] - 1)
    about = json.loads((out / "adapted" / "config.json").read_text())["provenance"]
    assert about["adapter"] == "style" and about["start"]["name"] == str(head) and about["before"]["step"] == 0
