"""The unrolled steps of training are the steps of a draft, and what they count is what a draft would have had right."""

from __future__ import annotations

import pytest
import torch

from drafter.features import Features, read
from drafter.loss import Candidates, Recipe, unrolled
from drafter.network import head_tensors
from specdec.model.decoder import Decoder
from tests.test_network import draft_ids, drafting, network
from tests.tiny import FAMILIES, VOCAB, prompt
from tests.tiny_assistant import backbone

SCALE = 2.0


def text_of(decoder: Decoder, length: int = 15) -> Features:
    (text,) = read(decoder, [prompt(length, seed=2)[0]], torch.float32)
    return text


def candidates(family: str) -> Candidates:
    ids = draft_ids(network(family).spec)
    return Candidates.of(torch.arange(VOCAB) if ids is None else ids, VOCAB)


def embed(decoder: Decoder):
    return lambda ids: decoder.embed(ids).clone()  # not an inference tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unrolled_steps_are_the_drafting_loop(family: str) -> None:
    decoder, mine, theirs = backbone(family), network(family), drafting(family)
    text, known, recipe = text_of(decoder), candidates(family), Recipe(steps=3)
    found = unrolled(mine, embed(decoder), text, SCALE, known, recipe)
    n = len(text)
    assert found.rows.tolist() == [n - 1, n - 2, n - 3]
    accepted, entropy, feature, total = [0, 0, 0], 0.0, 0.0, 0.0
    store = decoder.new_cache()
    with torch.inference_mode():
        for p in range(1, n):
            decoder.forward(text.tokens[p - 1 : p], store)
            store.commit(1)
            state, spans, alive = text.hidden[p - 1 : p], theirs.spans(p), True
            for step in range(min(3, n - p)):
                at = p + step
                newest = text.tokens[at : at + 1]
                x, state = theirs.step(decoder.embed(newest), state, spans, store)
                alive = alive and bool(theirs.head.best(x, newest) == text.best[at])
                accepted[step] += alive
                wanted = int(known.slots[text.best[at]])
                logits = theirs.head.logits(x, newest) if mine.spec.pruned else theirs.head.logits(x)
                ce = 0.0 if wanted == len(known.ids) else -float(torch.log_softmax(logits[0], 0)[wanted])
                smooth = float(torch.nn.functional.smooth_l1_loss(state / SCALE, text.hidden[at : at + 1] / SCALE))
                entropy, feature = entropy + ce, feature + smooth
                total += recipe.decay**step * (ce + recipe.feature_weight * smooth)
    assert found.accepted.tolist() == accepted
    torch.testing.assert_close(float(found.cross_entropy), entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(float(found.feature), feature, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(float(found.loss.detach()), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_a_chunked_loss_is_the_whole_one(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, mine = backbone("llama"), network("llama")
    ids = draft_ids(mine.spec)
    assert ids is not None
    known = Candidates.of(ids, VOCAB, decoder.head.rows(ids, torch.float32))
    text = text_of(decoder, 40)

    def gradients() -> list[torch.Tensor]:
        mine.zero_grad(set_to_none=True)
        unrolled(mine, embed(decoder), text, SCALE, known, Recipe(soft=soft)).loss.backward()
        return [mine[name].grad.clone() for name in head_tensors(mine.spec)]

    whole = gradients()
    monkeypatch.setattr("drafter.loss._CHUNK", 7 * len(ids))
    for a, b in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    mine.zero_grad(set_to_none=True)
