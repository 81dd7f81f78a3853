"""Texts that `python -m eval.gpu` compares, here on the CPU, and the memory that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.gpu import command, texts, timing


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.make_tiny(tmp_path_factory.mktemp("pair"), 100.0)


def test_texts_of_a_tiny_pair_go_past_its_window_and_are_identical(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = json.loads((tiny / "config.json").read_text())["text_config"]["sliding_window"]
    assert window < int(texts.TINY_LENGTH[-1])
    monkeypatch.setattr(texts, "TINY_LENGTH", ("--prompts", "1", "--tokens", str(window + 6)))
    found = [texts.text_figures(words, "cpu", 100.0, tmp_path / "a.json") for _, words in texts.comparisons(tiny, ())]
    # greedy and sampled; an assistant, suffix matches and a script
    assert found == [{"identical": 6, "total": 6, "differing": []}] * 2
    assert texts.share(found) == 1.0


def test_texts_that_differ_are_counted_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "a.json"
    first = {"prompt": "p", "position": 3}
    kinds = [{"drafter": "suffix", "first": None}, {"drafter": "scripted", "first": first}]
    record.write_text(json.dumps({"identical": 1, "total": 2, "configurations": kinds}))
    asked: list[Any] = []
    monkeypatch.setattr(texts, "_run", lambda *words: asked.append(words))
    found = texts.text_figures(("--model", "a"), "cuda", 5.0, record)
    assert found == {"identical": 1, "total": 2, "differing": kinds[1:]}
    ((words, seconds, well),) = asked
    assert words == ["eval.exactness", "--model", "a", "--device", "cuda", "--json", str(record)]
    assert seconds == 5.0 and set(well) == {0, 1}
    assert texts.share([found, {"identical": 2, "total": 2}]) == 0.75


def test_each_model_is_a_stage_and_one_that_fails_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def figures(words: Any, device: str, seconds: float, record: Path) -> dict[str, Any]:
        if "absent" in words:
            raise RuntimeError("eval.exactness ended with 2")
        return {"identical": 3, "total": 3, "differing": []}

    monkeypatch.setattr(texts, "make_tiny", lambda folder, seconds: folder / "tiny")
    monkeypatch.setattr(texts, "text_figures", figures)
    stages = command.Stages(1000.0, lambda name: None)
    command._compare_texts(stages, torch.device("cuda"), ["present", "absent"])
    assert [one["stage"] for one in stages.stages if one["error"]] == ["texts of absent"]
    assert set(stages.figures["texts_wanted"]) - set(stages.figures["texts"]) == {"absent"}
    assert stages.figures["identical_share"] == 1.0


@pytest.mark.parametrize(("said", "bytes_"), [("512\n", 512 << 20), ("[N/A]\n", None), (None, None)])
def test_memory_in_use_is_what_the_driver_says(
    said: str | None, bytes_: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    if said is not None:
        program.write_text(f'#!/bin/sh\necho "$1" > "{tmp_path}/asked"\nprintf "%s" "{said}"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert timing.bytes_in_use() == bytes_
    if said is not None:
        assert (tmp_path / "asked").read_text() == "--id=3\n"
