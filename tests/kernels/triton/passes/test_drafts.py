"""Drafts and drafted texts on a GPU: a draft in one pass is the draft step by step, and drafting changes no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from drafter import load_drafter
from drafter.config import MTPHeadConfig, head_spec
from drafter.files.head import save_head
from drafter.train.initial import initial_tensors
from specdec.cache import KVCache
from specdec.drafting.protocol import Draft, FixedLength
from specdec.engine.sampling import Noise
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.kernels import DraftParts, DraftSampling, Matrix
from specdec.kernels.triton.passes.draft import DeviceDraft
from specdec.kernels.triton.passes.graphs import MOST_ROWS
from specdec.model.decoder import Decoder
from specdec.model.states import States
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


class Knowing:
    """Draft for any of several texts what follows in it, the third token of a draft wrong."""

    name, max_draft, aux_layers = "knowing", 4, ()

    def __init__(self, answers: Sequence[list[int]]) -> None:
        self.answers = answers

    def bind(self, backbone: Decoder) -> None:
        """Every backbone will do."""

    def start(self, cache: KVCache, noise: Noise | None = None) -> Knowing:
        return self

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        answer = next(one for one in self.answers if one[: len(tokens)] == list(tokens))
        follow = answer[len(tokens) : len(tokens) + k]
        return Draft.by(self.name, [(token + (i == 2)) % VOCAB for i, token in enumerate(follow)])


def test_five_drafted_texts_side_by_side_are_those_alone_and_one_ends_inside_a_draft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = device_decoder("gemma3", "int4", (1, 2), graphs_here())

    def requests() -> list[Request]:
        return [request(prompt(3 + i, seed=i)[0], 6, None if i % 2 else i) for i in range(5)]

    asked, plain = requests(), [alone(decoder, one) for one in requests()]
    drafter, last = Knowing([*plain]), plain[3][len(asked[3].row) + 1]  # what it drafts goes on behind that token
    asked[3] = replace(asked[3], stop=lambda tokens, choice: choice.token == last)
    plain[3] = plain[3][: plain[3].index(last, len(asked[3].row)) + 1]
    stats, rows = GenerationStats(), list[int]()
    real = decoder.forward_many

    def counted(ids: Sequence[Tensor], *more: Any) -> States:
        rows.append(sum(map(len, ids)))
        return real(ids, *more)

    monkeypatch.setattr(decoder, "forward_many", counted)
    found = {number: row.tolist() for number, row, _ in decode(
        decoder, drafter, FixedLength(4), asked, stats, max_batch=5
    )}  # fmt: skip
    assert found == dict(enumerate(plain))
    assert len(plain[3]) < len(asked[3].row) + 6 and stats.accepted > 9
    assert max(rows) > MOST_ROWS, "more than a graph is captured for"


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
