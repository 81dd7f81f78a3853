"""Drafts and drafted texts on a GPU: a draft in one pass is the draft step by step, and drafting changes no text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from drafter import load_drafter
from drafter.config import MTPHeadConfig, head_spec
from drafter.files.head import save_head
from drafter.train.initial import initial_tensors
from specdec.drafting.protocol import FixedLength
from specdec.engine.sampling import Noise
from specdec.engine.stats import GenerationStats
from specdec.kernels import DraftParts, DraftSampling, Matrix
from specdec.kernels.triton.passes.draft import DeviceDraft
from specdec.model.decoder import Decoder
from tests.support.decoding import alone, decode, request
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import VOCAB, WINDOW, prompt
from tests.support.tiny_assistant import prefilled
from tests.support.triton.layers import device_decoder, graphs_here, passes_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", [None, 3])
def test_drafted_text_is_plain_text_past_the_window(seed: int | None) -> None:
    graphs = graphs_here()
    decoder = device_decoder("gemma4", "int8", (1, 2), graphs)
    ids, new = prompt(WINDOW - 2, seed=1)[0], 9
    plain = alone(decoder, request(ids, new, seed))
    assert len(plain) == WINDOW - 2 + new
    captured = graphs.counts["pass captured"]
    assert captured == 1, "passes of one row"
    drafter, stats = ScriptedDrafter(plain, SCRIPTS["half right"], VOCAB), GenerationStats()
    ((_, row, _),) = decode(decoder, drafter, FixedLength(3), [request(ids, new, seed)], stats)
    assert row.tolist() == plain
    assert stats.accepted == 5 and stats.rounds == 3
    assert graphs.counts["pass captured"] == 2, "passes of four rows"


def head(folder: Path, decoder: Decoder, aux_layers: tuple[int, ...]) -> Path:
    """Save an untrained head for `decoder`, of every fourth token, in `folder`."""
    ids = torch.arange(0, VOCAB, 4, dtype=torch.int64)
    config = replace(MTPHeadConfig.like(decoder.spec, 1, len(ids)), aux_layers=aux_layers)
    tensors = initial_tensors(head_spec(config, decoder.spec), decoder, ids)
    if aux_layers:
        tensors["fuse.weight"].normal_(generator=torch.Generator().manual_seed(0)).mul_(0.2)
    save_head(folder, config, tensors, ids, decoder, {})
    return folder


@pytest.mark.parametrize("aux_layers", [(), (1,)])
def test_a_draft_in_one_pass_is_the_draft_step_by_step(aux_layers: tuple[int, ...], tmp_path: Path) -> None:
    graphs = graphs_here()
    whole = device_decoder("llama", "int8", (0, 1, 2, 3))  # the head was made for all of it
    folder = head(tmp_path, whole, aux_layers)
    decoder = device_decoder("llama", "int8", (0, 1, 2, 3), graphs)
    drafter = load_drafter(folder, strict=False)
    drafter.bind(decoder)
    assistant = drafter._assistant
    assert assistant is not None
    passes = passes_of(assistant.stack, graphs)
    embedding = decoder.embedding.packed
    assert embedding is not None
    parts = DraftParts(
        pre=assistant.pre.matrix,
        post=assistant.post.matrix,
        head=Matrix(assistant.head.weight.packed),
        embedding=embedding,
        embed_scale=decoder.spec.embed_scale,
        ids=assistant.head.ids,
        fuse=None if assistant.fuse is None else assistant.fuse.matrix,
        eps=assistant.spec.text.norm_eps,
    )
    draft = DeviceDraft(passes, parts)
    ids = prompt(12, seed=2)[0]
    cache, states = prefilled(decoder, ids[:-1], drafter.aux_layers)
    found = []
    for fused in (None, draft, draft, draft):
        drafter._fused = fused
        found.append(drafter.start(cache).propose(ids.tolist(), states, 2).tokens)
    assert found[1:] == [found[0]] * 3 and len(found[0]) == 2
    assert graphs.counts["draft eager"] == graphs.counts["draft captured"] == 1
    assert graphs.counts["draft replayed"] == 2
    assert not draft.usable(cache.views), "gradients are on here"
    sampled = []
    for fused in (None, draft):
        drafter._fused = fused
        sampled.append(drafter.start(cache, Noise(3)).propose(ids.tolist(), states, 2).tokens)
    assert sampled[0] == sampled[1] != found[0], "the noise is the host's, and changes what is drafted"
    assert graphs.counts["draft eager"] == 2
    with torch.inference_mode():
        assert draft.usable(cache.views)
        assert not draft.usable(cache.views, DraftSampling([1], 1.0, 5, 1.0, 0.0)), "a sort goes step by step"
