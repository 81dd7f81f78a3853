"""A whole model of each of llama.cpp's types that have forms of blocks of their own."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

import specdec
from eval.synthetic.packed.folders import bfloat16_on_lattice
from specdec.memory.plan import loaded_bytes
from specdec.open import open_checkpoint
from specdec.weights import GGUFCheckpoint
from specdec.weights.formats.experts import with_gathered_experts
from specdec.weights.gguf.blocks import BLOCKS
from tests.support.tiny import WINDOW, prompt, tiny_model
from tests.support.tiny_gguf import write_model

TYPES = [kind for kind, ours in BLOCKS.items() if ours.table is not None or ours.sub]


@pytest.mark.filterwarnings("ignore:.* bits a weight in memory:UserWarning")
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_drafted_text_is_plain_text_past_the_window(kind: Type, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "gemma3-wide", kind, random=True)
    model = specdec.load(path, drafter="suffix", device="cpu")
    ids = prompt(WINDOW, seed=1).repeat(1, 3)
    plain, drafted = (
        model.generate(ids, max_new_tokens=2 * WINDOW, do_sample=False, speculation=how) for how in (False, True)
    )
    assert torch.equal(plain, drafted)
    assert model.last_stats is not None and model.last_stats.drafted > 0
    checkpoint = GGUFCheckpoint(path)
    sizes = {checkpoint.loaded_bytes(name, torch.float32) for name in ("token_embd.weight", "blk.0.ffn_up.weight")}
    assert sizes == {model.decoder.embedding.nbytes, model.decoder.layers[0].up.weight.nbytes}
    whole = specdec.load(path, drafter=None, device="cpu", quantize="none", dtype=torch.float32)
    assert model.decoder.nbytes < whole.decoder.nbytes / 4
    with torch.no_grad():
        ours, theirs = (each(ids).logits.float() for each in (model, whole))
    assert (ours - theirs).norm() < 0.1 * theirs.norm()  # activations are rounded to eight bits


@pytest.mark.filterwarnings("ignore:.* bits a weight in memory:UserWarning")
@pytest.mark.parametrize("ollama", [False, True])
def test_a_mixture_in_nvfp4_has_a_scale_for_each_expert(ollama: bool, tmp_path: Path) -> None:
    """Those of the outputs are one number with the router's, as llama.cpp's converter writes them."""
    path = write_model(tmp_path / "model.gguf", "gemma4-moe-wide", Type.NVFP4, random=True, ollama=ollama)
    ids = prompt(40)
    exact = specdec.load(path, drafter=None, device="cpu", quantize="none", dtype=torch.float32)
    theirs = copy.deepcopy(tiny_model("gemma4-moe-wide"))
    found = theirs.load_state_dict(dict(exact.named_parameters()), strict=False)
    assert not found.unexpected_keys and not [name for name in found.missing_keys if ".experts." in name]
    with torch.inference_mode():
        expected = theirs(ids).logits
    assert float((exact(ids).logits - expected).abs().max() / expected.abs().max()) < 1e-4
    layer = GGUFCheckpoint(path).tensor("blk.1.ffn_gate_exps.weight" if ollama else "blk.1.ffn_gate_up_exps.weight")
    sizes = layer.flatten(1).norm(dim=1)
    assert float((sizes[-1] / sizes[0]).log()) == pytest.approx(math.log(0.08 / 0.06), abs=0.1)
    model = specdec.load(path, drafter="suffix", device="cpu")
    checkpoint = with_gathered_experts(GGUFCheckpoint(path), 8)
    for name in ("blk.0.ffn_gate_up_exps.weight", "blk.0.ffn_down_exps.weight"):
        assert checkpoint.loaded_bytes(name, torch.float32) == checkpoint.weight(name, torch.float32).nbytes
    plain, drafted = (
        model.generate(ids.repeat(1, 3), max_new_tokens=40, do_sample=False, speculation=how) for how in (False, True)
    )
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("kind", [Type.BF16, Type.F32], ids=lambda kind: kind.name)
def test_the_plan_of_floats_that_were_trained_for_4_bits(kind: Type, tmp_path: Path) -> None:
    """4.5 bits a weight, as what is loaded: not the 5 of other floats."""
    model = copy.deepcopy(tiny_model("gemma3-wide"))
    for i, (name, matrix) in enumerate(model.named_parameters()):
        if matrix.ndim == 2 and "lm_head" not in name:
            matrix.data = bfloat16_on_lattice(*matrix.shape, seed=i).float() * 16
    path = write_model(tmp_path / "model.gguf", "gemma3-wide", kind, model=model)
    spec, source, *_ = open_checkpoint(path)
    decoder = specdec.load(path, drafter=None, quantize="int4", device="cpu").decoder
    assert loaded_bytes(spec, source, "int4", torch.float32) == decoder.nbytes
    assert 8 * decoder.layers[0].up.weight.nbytes / decoder.layers[0].up.weight.dequantize().numel() == 4.5
