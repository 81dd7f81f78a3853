"""A whole model of each of llama.cpp's types that have forms of blocks of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

import specdec
from specdec.weights import GGUFCheckpoint
from specdec.weights.gguf.blocks import BLOCKS
from tests.support.tiny import WINDOW, prompt
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
