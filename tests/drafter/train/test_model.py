"""The head that is trained is the head that drafts, and a row sees what a drafter sees and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drafter.config import head_tensors
from drafter.data.features import AttentionStates
from specdec import kernels
from specdec.cache import KVCache
from specdec.model.decoder import Decoder
from tests.support.tiny import FAMILIES, WINDOW, prompt
from tests.support.tiny_assistant import backbone, draft_ids, drafting, network

STEPS = 3
LENGTH = 3 * WINDOW + 5


def text_of(decoder: Decoder, length: int) -> tuple[Tensor, Tensor, dict[int, AttentionStates]]:
    """Tokens [n], hidden [n, H] and the shared K/V of a random text."""
    ids = prompt(length, seed=8)[0]
    store = decoder.new_cache()
    hidden, kept = [], {layer: ([], []) for layer in decoder.spec.shared_kv_layers.values()}
    for part in ids.split(16):
        hidden.append(decoder.forward(part, store).last)
        store.commit(len(part))
        for layer, (keys, values) in kept.items():
            kept_by = store.stores[layer]
            assert kept_by is not None
            k, v = kernels.read_kv(kept_by.view, store.length - len(part), store.length)
            keys.append(k)
            values.append(v)
    return (
        ids,
        torch.cat(hidden),
        {layer: AttentionStates(torch.cat(k, 1), torch.cat(v, 1)) for layer, (k, v) in kept.items()},
    )


def prefilled(decoder: Decoder, ids: Tensor) -> KVCache:
    store = decoder.new_cache()
    for part in ids.split(16):
        decoder.forward(part, store)
        store.commit(len(part))
    return store


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_pass_is_the_drafters_step(family: str) -> None:
    decoder, mine, theirs = backbone(family), network(family), drafting(family)
    ids, hidden, keys = text_of(decoder, LENGTH)
    positions = torch.tensor([1, 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 2 * WINDOW + 3, LENGTH - STEPS])
    sight = mine.sight([(positions[:3], keys), (positions[3:], keys)])
    state = hidden[positions - 1]  # [R, H]
    outputs = []
    with torch.inference_mode():
        for step in range(STEPS):
            x, state = mine.step(decoder.embed(ids[positions + step]), state, sight)
            outputs.append((x, state))
        for row, p in enumerate(positions.tolist()):
            store = prefilled(decoder, ids[:p])
            one, spans = hidden[p - 1 : p], theirs.spans(p)
            for step in range(STEPS):
                newest = ids[p + step : p + step + 1]
                x, one = theirs.step(decoder.embed(newest), one, spans, store)
                torch.testing.assert_close(outputs[step][0][row], x[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(outputs[step][1][row], one[0], rtol=1e-4, atol=1e-4)
                logits, _ = theirs.head.score(x, newest)
                slots = None
                if (ids_ := draft_ids(mine.spec)) is not None:
                    found = (ids_ == newest).nonzero().flatten()
                    slots = found if len(found) else torch.tensor([len(ids_)])
                torch.testing.assert_close(mine.logits(x, slots), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4_unified"])
def test_a_row_does_not_see_the_keys_from_its_own_on(family: str) -> None:
    decoder, mine = backbone(family), network(family)
    ids, hidden, keys = text_of(decoder, LENGTH)
    positions = torch.tensor([3, 2 * WINDOW])

    def run(keys: dict[int, AttentionStates]) -> Tensor:
        sight = mine.sight([(positions, keys)])
        return mine.step(decoder.embed(ids[positions]), hidden[positions - 1], sight)[0].detach()

    before = run(keys)
    for j in range(LENGTH):
        changed = {layer: AttentionStates(k.clone(), v.clone()) for layer, (k, v) in keys.items()}
        for k, v in changed.values():
            k[:, j] += 3.0
            v[:, j] -= 5.0
        moved = (run(changed) != before).any(dim=1).tolist()
        assert moved == [j < p for p in positions.tolist()], f"key {j}"  # every family has a full layer


def test_gradients_reach_every_parameter() -> None:
    for family in ("llama", "gemma3", "gemma4_unified", "qwen2"):
        decoder, mine = backbone(family), network(family)
        ids, hidden, keys = text_of(decoder, 40)
        positions = torch.arange(1, 30)
        state, sight = hidden[:29], mine.sight([(positions, keys)])
        total = torch.zeros(())
        for step in range(2):
            x, state = mine.step(decoder.embed(ids[positions + step]).clone(), state, sight)
            total = total + mine.logits(x, torch.arange(29)).square().sum() + state.square().sum()
        total.backward()
        for name in head_tensors(mine.spec):
            gradient = mine[name].grad
            assert gradient is not None and bool(gradient.isfinite().all()) and float(gradient.abs().sum()) > 0, name
        mine.zero_grad(set_to_none=True)
