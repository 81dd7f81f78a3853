"""Adapters through `specdec.load` and `generate`: named, switched by call, saved, planned for."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.drafting.registry import resolve_drafter
from tests.support.adapters.tiny_adapter import make_gguf, make_peft, merged, modules, parts
from tests.support.tiny import prompt, tiny_model
from tests.support.tiny_assistant import save_assistant

FAMILY = "gemma4_unified"
SETTINGS: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(FAMILY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": str(make_peft(folder / "first", FAMILY, 1)),
        "two": make_gguf(folder / "second.gguf", FAMILY, parts(modules(FAMILY), 2)),
    }


@pytest.fixture(scope="module")
def model(tiny: Path, files: dict[str, str | Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    head = tmp_path_factory.mktemp("head")
    save_assistant(head, FAMILY)
    return specdec.load(tiny, drafter=str(head), quantize="int8", device="cpu", adapter=files)


def texts(model: Any, ids: torch.Tensor, **more: Any) -> list[list[int]]:
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **{**SETTINGS, **more})
    rows: list[list[int]] = found.tolist()
    return rows


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 0.9, "seed": 4}], ids=["greedy", "sampled"])
def test_each_call_names_its_adapter_and_drafts_change_nothing(model: Any, sampled: dict[str, Any]) -> None:
    ids = torch.cat((prompt(20, 1), prompt(20, 2)))
    found = {}
    for name in ("one", "none", "two"):
        plain = texts(model, ids, adapter=name, speculation=False, reuse=False, **sampled)
        for length in ("adaptive", 4):
            assert texts(model, ids, adapter=name, draft_length=length, **sampled) == plain
        assert sum(model.last_stats.drafted_per_position) > 0
        found[name] = plain
    assert texts(model, ids, **sampled) == found["one"], "the first is the default"
    assert found["one"] != found["none"] != found["two"] != found["one"]


def test_the_text_is_that_of_the_merged_model(tiny: Path, tmp_path: Path) -> None:
    low_rank = parts(modules(FAMILY), 7)
    model = specdec.load(tiny, drafter="suffix", device="cpu", adapter=make_peft(tmp_path / "a", FAMILY, 7))
    oracle, ids = merged(FAMILY, low_rank), prompt(20, 3)
    expected = oracle.generate(ids, attention_mask=torch.ones_like(ids), **SETTINGS).tolist()
    assert texts(model, ids) == expected != texts(model, ids, adapter="none")
    with torch.no_grad():
        assert (model(ids).logits - oracle(ids).logits).abs().max() < 1e-4  # calls of the model have it too


def test_adapters_are_loaded_and_chosen_as_transformers_does(model: Any, tiny: Path, files: dict[str, Any]) -> None:
    other, ids = specdec.load(tiny, drafter=None, quantize="int8", device="cpu"), prompt(20, 1)
    plain = texts(other, ids)
    other.load_adapter(files["two"])
    assert other.active_adapters() == [] and texts(other, ids) == plain
    other.set_adapter("second")
    assert other.active_adapters() == ["second"]
    assert texts(other, ids) == texts(model, ids, adapter="two") != plain
    other.disable_adapters()
    assert texts(other, ids) == plain
    with pytest.raises(ValueError, match="there is no adapter 'third'; there are: second, none"):
        texts(other, ids, adapter="third")
    with pytest.raises(ValueError, match="there is no adapter 'third'"):
        other.set_adapter("third")
    for refused in (other.add_adapter, other.delete_adapter, other.enable_adapters):
        with pytest.raises(ValueError, match="adapters are loaded and named here"):
            refused("x")


def test_a_conversation_goes_on_with_its_adapter_alone(
    model: Any, tiny: Path, files: dict[str, Any], tmp_path: Path
) -> None:
    ids = prompt(30, 5)
    model.conversations.forget()
    expected = texts(model, ids, adapter="two")
    model.save_conversation(tmp_path / "saved", ids[0])
    renamed = specdec.load(tiny, drafter=None, quantize="int8", device="cpu", adapter={"new": files["two"]})
    assert renamed.load_conversation(tmp_path / "saved").cache.adapter == "new"
    assert texts(renamed, ids, adapter="new") == expected
    assert renamed.last_stats.reused == ids.shape[1] - 1
    texts(renamed, ids, adapter="none")
    assert renamed.last_stats.reused == 0
    plain = specdec.load(tiny, drafter=None, quantize="int8", device="cpu")
    with pytest.raises(ValueError, match="another model, or with other weights, adapter"):
        plain.load_conversation(tmp_path / "saved")


def test_an_adapter_that_does_not_fit_is_refused_before_the_model_is_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["specdec.load"], "build_decoder", lambda *given, **named: pytest.fail("it was read")
    )
    other = make_peft(tmp_path / "llama", "llama")
    with pytest.raises(ValueError, match=f"^{re.escape(str(other))}: .*which is none of the matrices"):
        specdec.load(tiny, adapter=other)
    nameless: Any = ["a", "b"]
    with pytest.raises(ValueError, match="must be a path, or names with their paths"):
        specdec.load(tiny, adapter=nameless)
    with pytest.raises(ValueError, match="there is no such file or folder; an adapter is"):
        specdec.load(tiny, adapter=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"an adapter \(LoRA\), which goes with a model: load the model"):
        specdec.load(tmp_path / "llama")


def test_a_memory_budget_counts_adapters(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = make_peft(tmp_path / "large", FAMILY, low_rank=parts(modules(FAMILY), 1, rank=400), r=400)
    monkeypatch.setattr(sys.modules["specdec.load"], "program_bytes", lambda device: 0)
    least = specdec.load(tiny, drafter=None, device="cpu", memory_budget=20_000_000, adapter=large).decoder
    without = specdec.load(tiny, drafter=None, device="cpu", memory_budget=20_000_000).decoder
    assert least.room is not None and without.room is not None
    assert without.room.cache - least.room.cache == least.adapters.nbytes > 5_000_000
    with pytest.raises(ValueError, match=r"workspace 0\.00, adapters 0\.01 and Python"):
        specdec.load(tiny, drafter=None, device="cpu", memory_budget=9_000_000, adapter=large)


def test_drafters_do_not_ask_which_adapter_there_is(model: Any) -> None:
    for name in ("suffix", "none"):
        ids = prompt(20, 1)
        assert texts(model, ids, drafter=resolve_drafter(name), adapter="two") == texts(model, ids, adapter="two")
