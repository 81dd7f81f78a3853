"""The unrolled steps of training are the steps of a draft, and what they count is what a draft would have had right."""

from __future__ import annotations

import pytest
import torch

from drafter.config import head_tensors
from drafter.data.features import Features, read
from drafter.inference import best
from drafter.settings import Recipe
from drafter.train.loss import Candidates, Losses, unrolled_loss
from specdec.model.decoder import Decoder
from tests.support.tiny import FAMILIES, VOCAB, prompt
from tests.support.tiny_assistant import backbone, draft_ids, drafting, network

SCALE = 2.0


def text_of(decoder: Decoder, length: int = 15) -> Features:
    (text,) = read(decoder, [prompt(length, seed=2)[0]], decoder.spec.shared_kv_layers.values(), torch.float32)
    return text


def candidates(family: str) -> Candidates:
    ids = draft_ids(network(family).spec)
    return Candidates.of(torch.arange(VOCAB) if ids is None else ids, VOCAB)


def embed(decoder: Decoder):
    return lambda ids: decoder.embed(ids).clone()  # not an inference tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unrolled_steps_are_the_drafting_loop(family: str) -> None:
    decoder, mine, theirs = backbone(family), network(family), drafting(family)
    text, known, recipe = text_of(decoder), candidates(family), Recipe(steps=3, deeper=1.0, soft=False)
    other = text_of(decoder, 9)
    found = unrolled_loss(mine, embed(decoder), [other, text], SCALE, known, recipe)
    alone = unrolled_loss(mine, embed(decoder), [other], SCALE, known, recipe)
    n = len(text)
    assert found.right.shape == (n - 3 + 6, 3) and torch.equal(found.right[:6], alone.right)
    accepted, entropy, feature, total = [0, 0, 0], 0.0, 0.0, 0.0
    store = decoder.new_cache()
    with torch.inference_mode():
        for p in range(1, n - 2):
            decoder.forward(text.tokens[p - 1 : p], store)
            store.commit(1)
            state, spans, alive = text.hidden[p - 1 : p], theirs.spans(p), True
            for step in range(3):
                at = p + step
                newest = text.tokens[at : at + 1]
                x, state = theirs.step(decoder.embed(newest), state, spans, store)
                alive = alive and bool(best(theirs.head, x, newest)[0] == text.best[at])
                accepted[step] += alive
                wanted = int(known.slots[text.best[at]])
                logits, _ = theirs.head.score(x, newest)
                ce = 0.0 if wanted == len(known.ids) else -float(torch.log_softmax(logits[0], 0)[wanted])
                smooth = float(torch.nn.functional.smooth_l1_loss(state / SCALE, text.hidden[at : at + 1] / SCALE))
                entropy, feature = entropy + ce, feature + smooth
                total += recipe.decay**step * (ce + recipe.feature_weight * smooth)
    assert found.right[6:].sum(0).tolist() == accepted
    for name, expected in (("cross_entropy", entropy), ("feature", feature), ("loss", total)):
        mine_alone = float((getattr(found, name) - getattr(alone, name)).detach())
        torch.testing.assert_close(mine_alone, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_a_chunked_loss_is_the_whole_one(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, mine = backbone("llama"), network("llama")
    ids = draft_ids(mine.spec)
    assert ids is not None
    known = Candidates.of(ids, VOCAB, decoder.head.rows(ids, torch.float32))
    text = text_of(decoder, 40)

    def gradients() -> list[torch.Tensor]:
        mine.zero_grad(set_to_none=True)
        unrolled_loss(mine, embed(decoder), [text], SCALE, known, Recipe(deeper=1.0, soft=soft)).loss.backward()
        return [mine[name].grad.clone() for name in head_tensors(mine.spec)]

    whole = gradients()
    monkeypatch.setattr("drafter.train.cross_entropy._CHUNK", 7 * len(ids))
    for a, b in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    mine.zero_grad(set_to_none=True)


def test_rows_that_do_not_go_on_are_stood_for_by_others() -> None:
    decoder, mine, known = backbone("llama"), network("llama"), candidates("llama")
    texts = [text_of(decoder, 40), text_of(decoder, 60)]

    def losses(seed: int, **changes: float) -> Losses:
        return unrolled_loss(
            mine,
            embed(decoder),
            texts,
            SCALE,
            known,
            Recipe(**{"steps": 3, "deeper": 1.0, "soft": False, **changes}),
            [2 * seed, 2 * seed + 1],
        )

    whole, some = losses(0), [losses(seed, deeper=0.3) for seed in range(400)]
    rows = 37 + 57
    assert whole.rows == some[0].rows == rows and len(whole.right) == rows and len(some[0].right) == 11 + 17
    for name in ("loss", "cross_entropy", "feature"):
        mean = sum(float(getattr(found, name).detach()) for found in some) / len(some)
        assert mean == pytest.approx(float(getattr(whole, name).detach()), rel=0.05)
    assert torch.equal(losses(5, deeper=0.3).loss, some[5].loss) and some[5].loss != some[6].loss
    only = losses(0, decay=0.0)
    assert losses(0, decay=0.0, deeper=0.3).loss == only.loss  # every row takes the first step
