"""The Gemma 4 assistant's network: against transformers' own module, and what it sees of the backbone's cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from drafter import MTPDrafter
from drafter.inference import CentroidHead, DenseHead, MTPHead, best
from specdec.cache import KVCache
from specdec.drafting.protocol import Draft
from specdec.model.decoder import Decoder
from specdec.model.states import States
from specdec.weights.tensors import DenseWeight
from tests.support.tiny import WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import (
    ASSISTANTS,
    CENTROIDS,
    backbone,
    bound,
    prefilled,
    proposed,
    save_assistant,
    transformers_assistant,
)

TOLERANCE = 1e-4
STEPS = 4


# Parity with transformers


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def parity(folder: Path, family: str, length: int) -> tuple[float, float, float]:
    """Largest relative errors at position `length`: logits and projected state of STEPS chained steps, both sides
    starting from transformers' K/V and hidden state; and the first step's state from our own backbone's."""
    theirs, model, decoder = transformers_assistant(folder, family), tiny_model(family), backbone(family)
    _, assistant = bound(folder, decoder)
    ids = prompt(length + 1, seed=length)[0]
    # Without a cache the sliding layers' K/V reach further back than the window: the mask has to cut them.
    backbone_pass = model(ids[None, :-1], use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
    shared = dict(backbone_pass.shared_kv_states)
    cache, states = prefilled(decoder, ids[:-1])
    spans, token = assistant.spans(length), ids[-1:]
    _, own_state = assistant.step(decoder.embed(token), states.last[None], spans, cache)

    copy_kv(shared, decoder, cache)
    their_state = backbone_pass.hidden_states[-1][:, -1:]  # [1, 1, backbone hidden]
    our_state = their_state[0]
    logits_error = state_error = own_error = 0.0
    for step in range(STEPS):
        output = theirs(
            inputs_embeds=torch.cat((model.get_input_embeddings()(token[None]), their_state), dim=-1),
            position_ids=torch.tensor([[length]]),
            shared_kv_states=shared,
        )
        x, our_state = assistant.step(decoder.embed(token), our_state, spans, cache)
        their_state, their_logits = output.last_hidden_state, output.logits[0]  # [1, 1, hidden], [1, vocab]
        our_logits, score = assistant.head.score(x, token)
        if isinstance(assistant.head, CentroidHead):
            assert score is not None
            theirs_scored = torch.nonzero(their_logits[0] > their_logits.min()).squeeze(1)
            assert torch.equal(score.sort().values, theirs_scored), "other clusters than transformers picks"
            logits_error = max(logits_error, relative(our_logits, their_logits[:, score]))
        else:
            logits_error = max(logits_error, relative(our_logits, their_logits))
        state_error = max(state_error, relative(our_state, their_state[0]))
        if step == 0:
            own_error = relative(own_state, their_state[0])
        token = their_logits.argmax(dim=-1)
        assert torch.equal(best(assistant.head, x, token)[0], token)
    return logits_error, state_error, own_error


def copy_kv(shared: dict[str, tuple[Tensor, Tensor]], decoder: Decoder, cache: KVCache) -> None:
    """Overwrite what `cache` holds with transformers' K/V: a chain of steps amplifies the rounding of others."""
    for kind, index in decoder.spec.shared_kv_layers.items():
        store = cache.stores[index]
        assert store is not None
        keys, values = (tensor[0].transpose(0, 1) for tensor in shared[kind])  # [kv_heads, n, D] -> [n, kv_heads, D]
        first = max(0, cache.length - store.slots)
        store.write(first, keys[first:], values[first:])


# Within the window; where it begins to cut and one further; past it; past the ring's end.
@pytest.mark.parametrize("length", [1, 9, WINDOW + 1, WINDOW + 2, 3 * WINDOW, 6 * WINDOW + 3])
@pytest.mark.parametrize("family", ASSISTANTS)
@pytest.mark.parametrize("head", [{}, CENTROIDS], ids=["dense", "centroids"])
def test_agrees_with_transformers(family: str, length: int, head: dict[str, Any], tmp_path: Path) -> None:
    logits, state, own = parity(save_assistant(tmp_path, family, **head), family, length)
    kind = "centroids" if head else "dense"
    print(f"{family} {kind} at {length}: logits {logits:.1e}, state {state:.1e}, from our own K/V {own:.1e}")
    assert logits < TOLERANCE
    assert state < TOLERANCE
    # Against float64, a mixture's states are off by 7e-6 and its K/V by 2e-5, here as in transformers' own float32. At
    # one position a random head makes 1.0e-4 of that.
    assert own < (1.2 * TOLERANCE if family == "gemma4-moe" else TOLERANCE)


@pytest.mark.parametrize("family", ASSISTANTS)
def test_reads_the_layers_that_transformers_shares(family: str) -> None:
    layers = tiny_model(family).model.layers
    shared = {layer.self_attn.layer_type: i for i, layer in enumerate(layers) if layer.self_attn.store_full_length_kv}
    if not shared:
        pytest.skip(f"transformers {transformers.__version__} shares nothing of a backbone that shares nothing itself")
    assert backbone(family).spec.shared_kv_layers == shared


# Keys at or after p


def steps(drafter: MTPDrafter, assistant: MTPHead, cache: KVCache, token: int, last: Tensor) -> list[Tensor]:
    """States of one round: the draft's every bit depends on them."""
    assert drafter._backbone is not None
    states, spans = [last[None]], assistant.spans(cache.length)
    ids = torch.tensor([token])
    for _ in range(STEPS):
        x, state = assistant.step(drafter._backbone.embed(ids), states[-1], spans, cache)
        ids, _ = best(assistant.head, x, ids)
        states.append(state)
    return states


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The ring has WINDOW - 1 + 64 = 79 slots, so that the longer ones wrap.
@pytest.mark.parametrize("length", [3, WINDOW, WINDOW + 2, 40, 79, 100, 150])
def test_sees_committed_keys_of_its_window_and_nothing_else(length: int, tmp_path: Path) -> None:
    decoder = backbone("gemma4_unified")
    drafter, assistant = bound(save_assistant(tmp_path, "gemma4_unified"), decoder)
    ids = prompt(length + 1, seed=length)[0]
    cache, states = prefilled(decoder, ids[:-1])
    clean = steps(drafter, assistant, cache, int(ids[-1]), states.last)
    draft = proposed(drafter, cache, ids, states, 8)

    for kind, index in decoder.spec.shared_kv_layers.items():
        store = cache.stores[index]
        assert store is not None
        oldest = 0 if store.window is None else max(0, length - 1 - WINDOW)
        visible = [p % store.slots for p in range(oldest, length)]
        hidden_slots = [slot for slot in range(store.slots) if slot not in visible]
        for tensor in (store.keys, store.values):
            if tensor is not None:  # Gemma 4's full layers keep no keys
                tensor[:, hidden_slots] = 1e4
        assert same(clean, steps(drafter, assistant, cache, int(ids[-1]), states.last)), f"{kind}: sees a hidden key"
        assert draft == proposed(drafter, cache, ids, states, 8)
        for slot in (visible[0], visible[-1]):  # the window ends exactly where it should
            kept = store.values[:, slot].clone()
            store.values[:, slot] += 1.0
            changed = steps(drafter, assistant, cache, int(ids[-1]), states.last)
            assert not same(clean, changed), f"{kind}: does not see a committed key"
            store.values[:, slot] = kept


@pytest.mark.parametrize("length", [9, 40, 100])
def test_rejected_drafts_leave_no_trace(length: int, tmp_path: Path) -> None:
    decoder = backbone("gemma4_unified")
    drafter, assistant = bound(save_assistant(tmp_path, "gemma4_unified"), decoder)
    ids = prompt(length + 1, seed=length)[0]
    cache, states = prefilled(decoder, ids[:-1])
    clean = steps(drafter, assistant, cache, int(ids[-1]), states.last)

    cache, _ = prefilled(decoder, ids[:-2])
    rows = torch.cat((ids[-2:-1], prompt(drafter.max_draft, seed=99)[0]))  # a full draft, all of it rejected
    again = decoder.forward(rows, cache).last[0]
    cache.commit(1)
    assert same(clean, steps(drafter, assistant, cache, int(ids[-1]), again))


def test_proposes_nothing_before_anything_is_committed(tmp_path: Path) -> None:
    decoder = backbone("gemma4_unified")
    drafter, _ = bound(save_assistant(tmp_path, "gemma4_unified"), decoder)
    states = States(torch.zeros(decoder.spec.hidden_size))
    assert proposed(drafter, decoder.new_cache(), torch.tensor([5]), states, 4) == Draft()
    cache, states = prefilled(decoder, torch.tensor([5]))
    assert len(proposed(drafter, cache, torch.tensor([5, 7]), states, 4).tokens) == 4
    assert len(proposed(drafter, cache, torch.tensor([5, 7]), states, 99).tokens) == drafter.max_draft


def test_heads_pick_the_best_token() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = DenseWeight(torch.randn(12, 4, generator=generator))
    x = torch.randn(1, 4, generator=generator)
    dense, newest = DenseHead(weight), torch.tensor([3])
    order = torch.randperm(12, generator=generator)
    centroids = DenseWeight(torch.randn(6, 4, generator=generator))
    every = CentroidHead(weight, centroids, order.view(6, 2), top=6)
    assert torch.equal(best(every, x, newest)[0], best(dense, x, newest)[0]), "all clusters are the whole vocabulary"
    one = CentroidHead(weight, centroids, order.view(6, 2), top=1)
    cluster = order.view(6, 2)[(x @ centroids.tensor.T).argmax()]
    assert int(best(one, x, newest)[0]) == int(cluster[dense.score(x, newest)[0][0, cluster].argmax()])
