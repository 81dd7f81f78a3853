"""A head follows a fine-tune: `--start` with an adapter, and for a merged model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import run
from tests.support.adapters.tiny_adapter import make_peft, merged, modules, parts
from tests.support.tiny_assistant import save_assistant
from tests.support.tiny_folder import make_folder, threads_restored

LORA = 3  # the seed of the adapter


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    with threads_restored():
        yield


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}?"}) for i in range(100)))
    return path


def trained(out: Path, model: Path, prompts: Path, *more: str | Path) -> dict[str, Any]:
    fixed = ["--model", model, "--device", "cpu", "--threads", "1", "--data", prompts, "--out", out, "--steps", "2"]
    sizes = ["--tokens", "200", "--max-new-tokens", "8", "--draft-length", "2"]
    record = out.with_suffix(".json")
    assert run.main([*map(str, ("train", *fixed, *sizes, *more)), "--json", str(record)]) == 0
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def test_a_head_of_ours_goes_on_with_an_adapter_and_with_a_merged_model(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_folder(tmp_path / "model", "llama")
    assert trained(tmp_path / "head", model, prompts, "--draft-vocab", "64")["before"] is None
    low_rank = parts(modules("llama"), LORA)
    adapter = make_peft(tmp_path / "lora", "llama", LORA, low_rank)
    other = make_folder(tmp_path / "merged", "llama")
    tuned = merged("llama", low_rank)
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.1)  # without it the model has the fingerprint of its parent
    tuned.save_pretrained(other)
    start = ["--start", tmp_path / "head"]
    capsys.readouterr()
    by_adapter = trained(tmp_path / "a", model, prompts, *start, "--adapter", adapter)
    said = capsys.readouterr().out
    assert f"had {by_adapter['before']['real']:.2f} on the same prompts before" in said
    assert "was trained for" not in said, "it is the backbone's own, with an adapter"
    by_merged = trained(tmp_path / "m", other, prompts, *start)
    assert f"{tmp_path / 'head'} was trained for {model}; it is adapted to {other}." in capsys.readouterr().out
    for record, out in ((by_adapter, tmp_path / "a"), (by_merged, tmp_path / "m")):
        about = json.loads((out / "config.json").read_text())
        assert record["before"] == record["scores"][0] == about["provenance"]["before"]
        assert record["before"]["step"] == 0 and record["scores"][-1]["step"] == 2
        assert about["provenance"]["score"] == record["best"]
    told = json.loads((tmp_path / "m" / "config.json").read_text())["provenance"]["start"]
    assert told["trained_for"] == str(model) and told["name"] == str(tmp_path / "head")
    assert run.main(["generate", "1?", "--model", str(other), "--drafter", str(tmp_path / "head")]) == 2, "to use it"
    assert "trained for another model" in capsys.readouterr().err


def test_a_gemma_4_assistant_goes_on_with_an_adapter(prompts: Path, tmp_path: Path) -> None:
    model = make_folder(tmp_path / "model", "gemma4_unified")
    assistant = save_assistant(tmp_path / "assistant", "gemma4_unified")
    adapter = make_peft(tmp_path / "lora", "gemma4_unified", LORA)
    record = trained(tmp_path / "out", model, prompts, "--start", assistant, "--adapter", adapter)
    about = json.loads((tmp_path / "out" / "specdec.json").read_text())["provenance"]
    assert about["before"] == record["before"] and about["adapter"] == "lora"
    assert about["start"] == {"name": str(assistant), "provenance": None, "trained_for": None}
    again = trained(tmp_path / "more", model, prompts, "--start", tmp_path / "out")
    assert again["before"]["step"] == 0


def test_training_begins_with_the_mean_of_heads(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = "gemma4_unified"
    model = make_folder(tmp_path / "model", family)
    one, two = (save_assistant(tmp_path / f"assistant-{seed}", family, seed) for seed in (1, 2))
    both = ["--start", one, "--average-with", two]
    record = trained(tmp_path / "out", model, prompts, *both, "--learning-rate", "1e-9")
    assert f"{one}, averaged with {two}, had {record['before']['real']:.2f}" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "specdec.json").read_text())["provenance"]["start"]
    assert told["name"] == str(one) and told["averaged_with"] == [{"name": str(two), "provenance": None}]
    first, second, mean = (load_file(folder / "model.safetensors") for folder in (one, two, tmp_path / "out"))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.equal(first["post_projection.weight"], second["post_projection.weight"])
