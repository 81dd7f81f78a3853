"""Folders that other programs quantised: the model of their numbers, and the same text with and without drafts."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdec
from eval.synthetic.packed.folders import bfloat16_on_lattice, write_packed
from eval.synthetic.packed.formats import FORMATS
from specdec.memory.plan import loaded_bytes
from specdec.model import quantized
from specdec.model.quantized import load_or_quantize
from specdec.open import open_checkpoint
from specdec.weights.formats.matrix import PackedMatrix
from tests.support.tiny import WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import save_assistant

pytestmark = pytest.mark.filterwarnings("ignore:.*bits a weight in memory")
CASES = [*(("gemma4_unified", format) for format in FORMATS), ("llama", "ct-g32"), ("llama", "mlx-5"), ("llama", "awq")]
LENGTH = 3 * WINDOW


def saved(folder: Path, family: str) -> Path:
    tiny_model(family).save_pretrained(folder)
    return folder


def multimodal(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


def bare(name: str) -> str:
    return name.removeprefix("model.")


def sanitized(name: str) -> str:
    return name.replace("model.", "language_model.model.", 1)


@pytest.mark.parametrize(("family", "format"), CASES)
def test_logits_are_those_of_transformers_with_the_same_numbers(family: str, format: str, tmp_path: Path) -> None:
    floats = write_packed(saved(tmp_path / "floats", family), tmp_path / "packed", format, vocabulary=family == "llama")
    theirs = copy.deepcopy(tiny_model(family))
    missing = theirs.load_state_dict(floats, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    ours = specdec.load(tmp_path / "packed", drafter=None, quantize="none", device="cpu")
    ids = prompt(LENGTH)
    with torch.inference_mode():
        expected, logits = theirs(ids).logits, ours(ids).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(("family", "format"), CASES)
def test_drafts_change_no_token(family: str, format: str, tmp_path: Path) -> None:
    """Past the window, with an assistant in the same format; suffix matches where there is none."""
    write_packed(saved(tmp_path / "floats", family), tmp_path / "packed", format)
    drafter = "suffix"
    if family == "gemma4_unified":
        save_assistant(tmp_path / "assistant-floats", family)
        write_packed(tmp_path / "assistant-floats", tmp_path / "assistant", format, vocabulary=True)
        drafter = str(tmp_path / "assistant")
    model = specdec.load(tmp_path / "packed", drafter=drafter, quantize="int4", device="cpu")
    ids = torch.cat([prompt(WINDOW)] * 2, dim=1)  # suffixes that match
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "seed": 3}):
        texts = [
            model.generate(ids, max_new_tokens=2 * WINDOW, draft_length=3, speculation=drafted, **how)[0].tolist()
            for drafted in (False, True)
        ]
        assert texts[0] == texts[1]
        assert model.last_stats.drafted > 0 or drafter == "suffix"


@pytest.mark.parametrize(("rename", "in_text"), [(multimodal, True), (sanitized, False), (bare, False)])
def test_names_of_every_class_and_both_places_of_the_config(
    rename: Callable[[str], str], in_text: bool, tmp_path: Path
) -> None:
    """The multimodal class's names with the config in its text part, MLX's, and names without any prefix."""
    floats = saved(tmp_path / "floats", "gemma4_unified")
    config = json.loads((floats / "config.json").read_text())
    (floats / "config.json").write_text(json.dumps({"model_type": "gemma4_unified", "text_config": config}))
    format = "ct-g32" if in_text else "mlx-4"
    write_packed(floats, tmp_path / "packed", format, rename, in_text)
    model = specdec.load(tmp_path / "packed", drafter=None, device="cpu")
    assert all(layer.gate.weight.packed is not None for layer in model.decoder.layers)
    assert not hasattr(model.config, "quantization_config")


def test_a_config_that_names_no_method_and_a_stored_tied_head(tmp_path: Path) -> None:
    """As in Google's unquantised checkpoints; and a head that is stored, packed, although it is the embedding."""
    folder = saved(tmp_path / "floats", "gemma4_unified")
    tensors = load_file(folder / "model.safetensors")
    head = FORMATS["ct-g32"].store(tensors["model.embed_tokens.weight"])[0]
    save_file(tensors | {f"lm_head.{part}": tensor for part, tensor in head.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quantized": False}}))
    model = specdec.load(folder, drafter=None, device="cpu")
    theirs = tiny_model("gemma4_unified")
    with torch.inference_mode():
        assert torch.allclose(model(prompt(20)).logits, theirs(prompt(20)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_the_plan_counts_what_is_loaded(quantize: str | None, tmp_path: Path) -> None:
    for format in ("ct-g64", "mlx-4", "nf4-double", "mlx-mxfp4", "ct-nvfp4", "mlx-mxfp8"):
        folder = tmp_path / format
        write_packed(saved(tmp_path / f"{format}-floats", "llama"), folder, format)
        spec, source, *_ = open_checkpoint(folder)
        decoder = specdec.load(folder, drafter=None, quantize=quantize, device="cpu").decoder
        assert loaded_bytes(spec, source, quantize, torch.float32) == decoder.nbytes


def test_a_large_one_is_kept_as_it_is_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized, "LEAST", 0)
    write_packed(saved(tmp_path / "floats", "llama"), tmp_path / "packed", "awq")

    def text() -> list[int]:
        model = specdec.load(tmp_path / "packed", drafter=None, device="cpu")
        return model.generate(prompt(20), max_new_tokens=20, do_sample=False)[0].tolist()

    first = text()
    assert len(list((tmp_path / "cache" / "quantized").glob("packed-stored-*.packed"))) == 1
    monkeypatch.setattr(quantized, "load_or_quantize", lambda *arguments: None)
    assert text() == first
    monkeypatch.setattr(quantized, "load_or_quantize", load_or_quantize)
    assert text() == first


def test_a_kept_one_is_made_anew_where_its_matrices_become_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do in a version that reads a format better."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized, "LEAST", 0)
    write_packed(saved(tmp_path / "floats", "llama"), tmp_path / "packed", "nf4")

    def bits() -> int:
        gate = specdec.load(tmp_path / "packed", drafter=None, device="cpu").decoder.layers[0].gate.weight
        return gate.packed.bits

    with monkeypatch.context() as patch:
        patch.setattr(PackedMatrix, "is_refitted", True)
        assert bits() == 8
    assert bits() == 4


def test_a_model_that_was_trained_for_4_bits_takes_4_bits(tmp_path: Path) -> None:
    folder = saved(tmp_path / "floats", "gemma4-e2b")
    tensors = load_file(folder / "model.safetensors")
    for i, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            tensors[name] = bfloat16_on_lattice(*tensor.shape, seed=i) * 16
    save_file(tensors, folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = specdec.load(folder, drafter=None, quantize="int4", device="cpu").decoder
    matrices = [decoder.embedding, *(layer.gate.weight for layer in decoder.layers)]
    assert [(m.packed.bits, m.packed.minimum) for m in matrices] == [(4, None)] * len(matrices)
    back = decoder.layers[0].gate.weight.dequantize().bfloat16()
    assert float((back == tensors["model.layers.0.mlp.gate_proj.weight"]).float().mean()) > 0.95
