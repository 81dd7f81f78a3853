"""What a recipe may change of the loss: each is the formula that it names, worked out the slow way."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drafter.data.features import Features, read
from drafter.settings import Recipe
from drafter.train import cross_entropy
from drafter.train.cross_entropy import Choices, Teacher, scores
from drafter.train.cross_entropy import Path as DraftPath
from drafter.train.evaluate import teacher_forced
from drafter.train.loss import Candidates, unrolled_loss
from tests.support.tiny import VOCAB, prompt
from tests.support.tiny_assistant import backbone, draft_ids, drafting, network
from tests.support.tiny_run import BUDGET, training_run

ROWS, SIZE, CANDIDATES = 23, 8, 40


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.fixture(autouse=True, params=[False, True], ids=["whole", "in chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(cross_entropy, "_CHUNK", 7 * CANDIDATES)
        monkeypatch.setattr(cross_entropy, "_BLOCK", 3 * CANDIDATES)


@pytest.mark.parametrize(("temperature", "overlap"), [(1.0, 0.0), (0.6, 0.0), (1.0, 3.0), (0.7, 1.5)])
def test_targets_of_a_temperature_and_the_overlap(temperature: float, overlap: float) -> None:
    x, matrix = random(ROWS, SIZE, seed=1).requires_grad_(), random(CANDIDATES, SIZE, seed=2).requires_grad_()
    theirs, states = random(CANDIDATES, SIZE, seed=3), random(9, SIZE, seed=4)
    at, weights = torch.arange(ROWS, dtype=torch.int64) % 9, random(ROWS, seed=5).abs()
    wanted = torch.arange(ROWS, dtype=torch.int64) % (CANDIDATES + 1)
    found = scores(x, matrix, Teacher(wanted, theirs, states, at, temperature, overlap), weights)
    found.loss.backward()
    mine = [x.grad, matrix.grad]
    x.grad = matrix.grad = None
    q = torch.softmax(x @ matrix.t(), dim=-1)
    p = torch.softmax((states @ theirs.t())[at] / temperature, dim=-1)
    alpha, entropy = torch.minimum(p, q).sum(dim=-1), -(p * q.log()).sum(dim=-1)
    w = torch.exp(-overlap * alpha).detach()
    loss = (weights * (w * entropy + (1 - w) * (1 - alpha))).sum()
    loss.backward()
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.entropies, entropy.detach())
    assert torch.equal(found.right, q.argmax(dim=-1) == wanted)
    for one, other in zip(mine, (x.grad, matrix.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drafted", [False, True])
def test_a_row_counts_as_much_as_the_steps_before_it_survive(drafted: bool) -> None:
    """Eleven drafts, of which six go on for two more steps."""
    x, matrix = random(ROWS, SIZE, seed=1).requires_grad_(), random(CANDIDATES, SIZE, seed=2)
    q = torch.softmax(x @ matrix.t(), dim=-1)
    every = torch.tensor([0, 2, 3, 5, 8, 10])
    before = torch.cat((torch.arange(11), every, torch.arange(6) + 11))
    tokens = q.argmax(dim=-1).clone()
    tokens[[2, 12, 13]] = torch.tensor([1, CANDIDATES, 4])  # one of them is no candidate
    wanted, weights = torch.arange(ROWS, dtype=torch.int64), torch.full((ROWS,), 2.0, dtype=torch.float32)
    found = scores(x, matrix, Choices(wanted), weights, DraftPath((0, 11, 17), before, tokens, drafted))
    found.loss.backward()
    mine, x.grad = x.grad, None
    alive = torch.ones(ROWS, dtype=torch.float32)
    for row in range(11, ROWS):
        earlier = int(before[row])
        token = int(tokens[earlier])
        chance = 0.0 if token == CANDIDATES else float(q[earlier, token].detach())
        alive[row] = alive[earlier] * (float(q[earlier].argmax() == token) if drafted else chance)
    torch.testing.assert_close(found.alive, alive)
    assert not drafted or (alive == 0).nonzero()[:, 0].tolist() == [12, 18, 19], "behind rows 2, 12 and 13"
    loss = -(2 * alive * q.log()[torch.arange(ROWS, dtype=torch.int64), wanted]).sum()
    loss.backward()
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(mine, x.grad, rtol=1e-4, atol=1e-5)


def text_of(answer: int = 6, length: int = 15) -> Features:
    decoder = backbone("llama")
    (text,) = read(decoder, [prompt(length, seed=2)[0]], decoder.spec.shared_kv_layers.values(), torch.float32)
    return replace(text, answer=answer)


def slow_loss(text: Features, known: Candidates, recipe: Recipe, first: int) -> float:
    """The loss of the drafts from position `first` on, by the head that drafts, without the features' part."""
    decoder, theirs, total = backbone("llama"), drafting("llama"), 0.0
    store = decoder.new_cache()
    with torch.inference_mode():
        for p in range(1, len(text) - recipe.steps + 1):
            decoder.forward(text.tokens[p - 1 : p], store)
            store.commit(1)
            state, spans, alive = text.hidden[p - 1 : p], theirs.spans(p), 1.0
            for at in range(p, p + recipe.steps):
                newest = text.tokens[at : at + 1]
                x, state = theirs.step(decoder.embed(newest), state, spans, store)
                logits, _ = theirs.head.score(x, newest)
                q = torch.softmax(logits[0], 0)
                wanted = int(known.slots[text.best[at]])
                weight = alive if recipe.later != "decay" else recipe.decay ** (at - p)
                if p >= first and wanted < len(known.ids):
                    total -= weight * float(q[wanted].log())
                if at + 1 < len(text):
                    token = int(known.slots[text.tokens[at + 1]])
                    chance = 0.0 if token == len(known.ids) else float(q[token])
                    alive *= chance if recipe.later == "chance" else float(q.argmax() == token)
    return total


@pytest.mark.parametrize("later", ["decay", "chance", "draft"])
@pytest.mark.parametrize("prompt_rows", [0.0, 1.0])
def test_drafts_of_a_text_by_what_the_recipe_says(later: str, prompt_rows: float) -> None:
    mine = network("llama")
    ids = draft_ids(mine.spec)
    assert ids is not None
    text, known = text_of(), Candidates.of(ids, VOCAB)
    recipe = Recipe(3, 1.0, feature_weight=0.0, soft=False, later=later, prompt_rows=prompt_rows)
    embed = backbone("llama").embed
    found = unrolled_loss(mine, lambda tokens: embed(tokens).clone(), [text], 1.0, known, recipe, [0])
    first = 1 if prompt_rows else text.answer
    assert found.rows == len(found.right) == 15 - 3 - first + 1
    assert float(found.loss.detach()) == pytest.approx(slow_loss(text, known, recipe, first), rel=1e-4)


def test_a_share_of_the_rows_of_prompts() -> None:
    ids = draft_ids(network("llama").spec)
    assert ids is not None
    known = Candidates.of(ids, VOCAB)
    texts = [text_of(9), text_of(1), text_of(15)]
    embed = backbone("llama").embed

    def rows(share: float, seed: int = 0) -> int:
        recipe = Recipe(3, 0.5, soft=False, prompt_rows=share)
        seeds = [seed, seed + 1, seed + 2]
        return unrolled_loss(network("llama"), lambda t: embed(t).clone(), texts, 1.0, known, recipe, seeds).rows

    assert (rows(1.0), rows(0.5), rows(0.0)) == (36, (4 + 4) + 12 + 6, 4 + 12 + 1), "a text without an answer has one"


def test_teacher_forced_shares_are_of_all_drafts_of_the_answers() -> None:
    mine = network("llama")
    ids = draft_ids(mine.spec)
    assert ids is not None
    known, embed = Candidates.of(ids, VOCAB), lambda tokens: backbone("llama").embed(tokens).clone()
    texts = [text_of(6, 400), text_of(1, 400), text_of(400, 400)]
    right = unrolled_loss(mine, embed, texts[:1], 1.0, known, Recipe(3, 1.0, soft=False)).right.float()
    both = torch.cat((right[5:], right))
    assert teacher_forced(mine, embed, texts, known, 3) == pytest.approx(both.mean(dim=0).tolist())
    assert right.sum() > 0


def test_what_is_no_recipe() -> None:
    for changes in ({"overlap": 3.0}, {"target_temperature": 0.5}):
        with pytest.raises(ValueError, match="hard targets"):
            Recipe(soft=False, **changes)
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        Recipe(prompt_rows=2.0)


def test_a_state_of_earlier_days_is_gone_on_from(tmp_path: Path) -> None:
    run = training_run(tmp_path, budget=replace(BUDGET, steps=1, tokens=300))
    list(run.run())
    state = torch.load(run.state, weights_only=True)
    for name in ("later", "overlap", "target_temperature", "prompt_rows"):
        del state["settings"]["recipe"][name]
    torch.save(state, run.state)
    trainer = run.trainer
    assert trainer is not None
    trainer.restore(run.state)
    trainer.settings = replace(trainer.settings, recipe=replace(trainer.settings.recipe, prompt_rows=0.5))
    assert asdict(trainer.settings)["recipe"]["prompt_rows"] == 0.5
    with pytest.raises(ValueError, match="another recipe"):
        trainer.restore(run.state)
