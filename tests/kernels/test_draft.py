"""A draft made in one native call is the draft that is made step by step."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path

import pytest
import torch

import specdec
from drafter import load_drafter
from drafter.config import MTPHeadConfig, head_spec
from drafter.files.head import save_head
from drafter.train.initial import initial_tensors
from specdec import kernels
from specdec.engine.sampling import Noise, Warping
from specdec.model.decoder import Decoder
from tests.support.native.kernel_paths import NATIVE
from tests.support.native.needs_native import needs_kernels
from tests.support.tiny import VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import CENTROIDS, prefilled, save_assistant

NOISES = (
    Noise(3),
    Noise(4, Warping(0.3)),
    Noise(5, Warping(0.8, top_k=5)),
    Noise(6, Warping(1.5, top_p=0.7)),
    Noise(7, Warping(0.9, top_k=40, top_p=0.95, min_p=0.1)),
    Noise(8, Warping(top_k=1)),
)
LENGTHS = (1, 7, WINDOW + 1, 3 * WINDOW, 6 * WINDOW + 3)

# A draft in one call is the native kernels' own: without them there are only the steps, and nothing to compare.
pytestmark = needs_kernels


def quantised(folder: Path, family: str) -> Decoder:
    tiny_model(family).save_pretrained(folder)
    return specdec.load(folder, drafter=None, quantize="int8", device="cpu").decoder


def head(
    folder: Path, decoder: Decoder, draft_vocab: int, bigram: int, bits: int, aux_layers: tuple[int, ...] = ()
) -> Path:
    ids = torch.arange(draft_vocab, dtype=torch.int64) * (VOCAB // draft_vocab)
    base = MTPHeadConfig.like(decoder.spec, draft_vocab=draft_vocab)
    config = replace(base, bigram=bigram, aux_layers=aux_layers)
    tensors = initial_tensors(head_spec(config, decoder.spec), decoder, ids)
    if aux_layers:
        tensors["fuse.weight"].normal_(generator=torch.Generator().manual_seed(0)).mul_(0.2)
    save_head(folder, config, tensors, ids, decoder, {}, bits)
    return folder


def compared(decoder: Decoder, folder: Path, quantize: str | None = None) -> bool:
    """Whether drafts come in one call; they are the same in any case."""
    drafter = load_drafter(folder, quantize)
    drafter.bind(decoder)
    fused = drafter._fused
    for length in LENGTHS:
        ids = prompt(length + 1, seed=length)[0]
        cache, states = prefilled(decoder, ids[:-1], drafter.aux_layers)
        found = []
        for drafter._fused in (fused, None):
            for noise in (None, *NOISES):
                proposer = drafter.start(cache, noise)
                found.append([proposer.propose(ids.tolist(), states, k).tokens for k in (1, 2, 5, 8)])
        assert found[: len(found) // 2] == found[len(found) // 2 :]
        assert [len(tokens) for tokens in found[0]] == [1, 2, 5, 8]
        assert found[0] != found[1] != found[2], "noise changes what is drafted"
        assert found[0] == found[len(NOISES)], "one token is left: the likeliest"
    return fused is not None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize(("draft_vocab", "bits"), [(VOCAB, 8), (VOCAB // 2, 8), (VOCAB // 2, 4)])
def test_one_call_drafts_what_the_steps_draft(family: str, draft_vocab: int, bits: int, tmp_path: Path) -> None:
    decoder = quantised(tmp_path / "backbone", family)
    assert compared(decoder, head(tmp_path / "head", decoder, draft_vocab, 0, bits))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("aux_layers", [(1,), (2, 0)])
def test_one_call_fuses_other_layers_states(family: str, aux_layers: tuple[int, ...], tmp_path: Path) -> None:
    decoder = quantised(tmp_path / "backbone", family)
    assert compared(decoder, head(tmp_path / "head", decoder, VOCAB // 2, 0, 8, aux_layers))


def test_an_assistant_drafts_in_one_call(tmp_path: Path) -> None:
    decoder = quantised(tmp_path / "backbone", "gemma4_unified")
    assert compared(decoder, save_assistant(tmp_path / "assistant", "gemma4_unified"), "int8")


def test_what_goes_step_by_step(tmp_path: Path) -> None:
    decoder = quantised(tmp_path / "backbone", "llama")
    assert not compared(decoder, head(tmp_path / "bigram", decoder, VOCAB // 2, 32, 8))
    gemma = quantised(tmp_path / "gemma", "gemma4_unified")
    assert not compared(gemma, save_assistant(tmp_path / "clusters", "gemma4_unified", **CENTROIDS), "int8")
    assert not compared(gemma, save_assistant(tmp_path / "float", "gemma4_unified"), "none")


@pytest.mark.parametrize("noise", [None, *NOISES])
def test_a_draft_says_how_likely_its_tokens_are_and_ends_below_a_floor(noise: Noise | None, tmp_path: Path) -> None:
    decoder = quantised(tmp_path / "backbone", "llama")
    drafter = load_drafter(head(tmp_path / "head", decoder, VOCAB // 2, 0, 8))
    drafter.bind(decoder)
    ids = prompt(2 * WINDOW, seed=1)[0]
    cache, states = prefilled(decoder, ids[:-1])
    found, fused = [], drafter._fused
    for drafter._fused in (fused, None):
        proposer = drafter.start(cache, noise)
        whole = proposer.propose_while(ids.tolist(), states, 8, ())
        reached = list(accumulate(whole.chances, mul))
        assert len(whole.chances) == 8 and all(0 < chance <= 1 for chance in whole.chances)
        for end in (1, 3, 8):  # the product falls, so that a floor between two values ends the draft at the lower one
            above = reached[end - 2] if end > 1 else 1.0
            floors = [0.0] * (end - 1) + [(reached[end - 1] + above) / 2 + 1e-9] * (9 - end)
            part = proposer.propose_while(ids.tolist(), states, 8, floors)
            assert part.tokens == whole.tokens[:end] and part.chances == whole.chances[:end]
        found.append(whole)
    assert fused is not None and found[0].tokens == found[1].tokens
    assert found[0].chances == pytest.approx(found[1].chances, rel=1e-5)


def test_chances_are_the_same_bits_on_every_instruction_set(tmp_path: Path) -> None:
    decoder = quantised(tmp_path / "backbone", "llama")
    drafter = load_drafter(head(tmp_path / "head", decoder, VOCAB - 1, 0, 8))  # no multiple of 16 candidates
    drafter.bind(decoder)
    ids, found = prompt(WINDOW, seed=1)[0], []
    cache, states = prefilled(decoder, ids[:-1])
    for choice in NATIVE:
        kernels.choose(choice)
        found.append(drafter.start(cache).propose_while(ids.tolist(), states, 4, ()).chances)
    kernels.choose(os.environ.get("SPECDEC_KERNELS", "native"))
    assert len(set(found)) == 1 and len(found[0]) == 4
