"""The loss of a head: the K steps of a draft, from every position of a text at once.

Row r of a text stands for the draft that is made when token p = r + 1 is pending; the last rows, whose drafts would run
past the text, are left out. Step i of the draft gets token p + i - 1 (teacher forcing) and the head's own state of step
i - 1. The step should name the backbone's choice at position p + i - 1, and bring forth the backbone's state there. The
loss is

    sum over steps i of decay^(i - 1) * (cross entropy + feature_weight * SmoothL1(state / scale, hidden / scale))

with the weights that EAGLE-3 (arXiv 2503.01840) gives later steps, or others in the place of the cross entropy's
(`Recipe.later`). A choice that is not among the head's candidates is
left out of the cross entropy, and counts as a miss. The results are sums, not means: the caller adds texts up and
divides by the number of rows of all texts, on all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drafter.data.features import Features
from drafter.settings import Recipe
from drafter.train.cross_entropy import Choices, Path, Teacher, scores
from drafter.train.model import Network
from specdec.model.states import States


@dataclass(frozen=True)
class Candidates:
    """Keep the tokens that a head can propose: `ids` [candidates] ascending, `slots` [vocab] their places.

    The slot of a token that is no candidate is the candidates' count. `teacher` [candidates, backbone hidden]: the
    candidates' rows of the backbone's head, for soft targets.
    """

    ids: Tensor
    slots: Tensor
    teacher: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, vocab: int, teacher: Tensor | None = None) -> Candidates:
        """Return the candidates `ids` [candidates], ascending, out of `vocab` tokens, with the slot of every token."""
        slots = torch.full((vocab,), len(ids), dtype=torch.int64)
        slots[ids] = torch.arange(len(ids), dtype=torch.int64)
        return cls(ids, slots, teacher)


class Losses(NamedTuple):
    """Keep the sums of the losses over all `rows`, where the rows that went on count for the others too.

    `right` [rows that went on, K] bool: whether this draft of a row and all before it are right.
    """

    loss: Tensor
    cross_entropy: Tensor
    feature: Tensor
    rows: int
    right: Tensor


def unrolled_loss(
    network: Network,
    embed: Callable[[Tensor], Tensor],
    texts: Sequence[Features],
    scale: float,
    candidates: Candidates,
    recipe: Recipe,
    seeds: Sequence[int] = (),
) -> Losses:
    """Return the losses of the drafts in `texts`, at every position from which a whole draft fits.

    `embed` [n] -> [n, backbone hidden]; `scale`: the size of a hidden state; `seeds`: one for each text, which picks
    the rows that go on, where not all do, and those of prompts, where not all count.
    """
    # their tokens' positions
    rows = [torch.arange(1, 1 + rows_of(text, recipe.steps), dtype=torch.int64) for text in texts]
    if recipe.prompt_rows < 1:
        picked = zip(rows, texts, seeds, strict=True)
        rows = [_fewer_prompt_rows(part, text.answer, recipe.prompt_rows, seed) for part, text, seed in picked]
    count = sum(map(len, rows))
    total, features = torch.zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.float32)
    state, every, weight = torch.empty(0, dtype=torch.float32), None, 1.0
    drafts: list[_Drafts] = []
    sight = None
    # of all texts, [n] each and n rows
    tokens, choices = torch.cat([text.tokens for text in texts]), torch.cat([text.best for text in texts])
    states = States.cat([text.states(network.spec.aux_layers) for text in texts])
    begins = _firsts([text.tokens for text in texts])
    for step in range(recipe.steps):
        if step == 1 and recipe.deeper < 1:
            kept = [_some(len(part), recipe.deeper, seed) for part, seed in zip(rows, seeds, strict=True)]
            every = torch.cat([at + first for at, first in zip(kept, _firsts(rows), strict=True)])
            state, sight = state[every], None
            weight = sum(map(len, rows)) / len(every)
            rows = [part[at] for part, at in zip(rows, kept, strict=True)]
        if sight is None:
            sight = network.sight([(part, text.keys) for part, text in zip(rows, texts, strict=True)])
        at = torch.cat([part + first + step for part, first in zip(rows, begins, strict=True)])  # [R]
        if step == 0:
            state = network.first(states[at - 1].map(Tensor.float))  # [R, H]
        newest, hidden = tokens[at], states.last[at].float()  # [R], [R, H]
        x, state = network.step(embed(newest), state, sight)
        follows = tokens[(at + 1).clamp(max=len(tokens) - 1)]  # behind the last step nothing follows
        slots = candidates.slots
        drafts.append(_Drafts(x, slots[newest], slots[choices[at]], slots[follows], at, weight))
        feature = F.smooth_l1_loss(state.float() / scale, hidden / scale, reduction="sum") / hidden.shape[1]
        total = total + weight * recipe.decay**step * recipe.feature_weight * feature
        features = features + weight * feature.detach()
    entropy, entropies, right = _scored(network, drafts, states.last, candidates, recipe, every)
    if every is not None:
        right[0] = right[0][every]
    return Losses(total + entropy, entropies, features, count, torch.stack(right, dim=1).cumprod(dim=1).bool())


def _some(count: int, share: float, seed: int) -> Tensor:
    """Return that share of 0 .. count - 1, at least one of them, ascending."""
    picked: Tensor = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[
        : max(1, round(share * count))
    ]
    return picked.sort().values


def _fewer_prompt_rows(rows: Tensor, answer: int, share: float, seed: int) -> Tensor:
    """Return the rows from `answer` on and that share of those before it, at least one row in all."""
    prompt, learned = rows[rows < answer], rows[rows >= answer]
    if share and len(prompt):
        learned = torch.cat((prompt[_some(len(prompt), share, seed)], learned))
    return learned if len(learned) else rows[-1:]


def _firsts(rows: Sequence[Tensor]) -> list[int]:
    """Return where each text's rows begin among the rows of all texts."""
    return _starts([len(part) for part in rows])


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return where each of several pieces of so many rows begins."""
    return [0, *accumulate(sizes)][:-1]


def rows_of(text: Features, steps: int) -> int:
    """Count the positions p >= 1 of `text` from which all `steps` drafts have a label."""
    assert len(text) > steps, "a text must be longer than a draft"
    return len(text) - steps


class _Drafts(NamedTuple):
    """Keep one step of all rows: the head's input `x` [R, hidden], the places of the newest, of the wanted and of the
    text's next tokens among the candidates [R], the rows of the backbone's states that chose the wanted tokens [R], and
    the weight of a row."""

    x: Tensor
    newest: Tensor
    wanted: Tensor
    follows: Tensor
    at: Tensor
    weight: float


def _scored(
    network: Network,
    drafts: Sequence[_Drafts],
    states: Tensor,
    candidates: Candidates,
    recipe: Recipe,
    every: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the cross entropies' part of the loss, their sum, and for each step which rows name their wanted
    candidate.

    All steps are scored at once: the head's matrix has one gradient, and a state that several steps learn from is
    scored once. `every`: which rows of the first step the later ones are of; None: all.
    """
    sizes = [len(made.at) for made in drafts]
    x, newest, wanted, follows, at = (torch.cat(parts) for parts in zip(*(made[:5] for made in drafts), strict=True))
    counts = torch.cat([torch.full((len(made.at),), made.weight, dtype=torch.float32) for made in drafts])
    # counts and decays [rows of all steps]
    decays = torch.cat([torch.full((n,), recipe.decay**step, dtype=torch.float32) for step, n in enumerate(sizes)])
    targets: Choices | Teacher = Choices(wanted)
    if recipe.soft:
        assert candidates.teacher is not None
        targets = Teacher(wanted, candidates.teacher, states, at, recipe.target_temperature, recipe.overlap)
    path = None
    if recipe.later != "decay":
        decays = torch.ones_like(decays)
        path = _path(sizes, every, follows, drafted=recipe.later == "draft")
    found = scores(*network.logit_factors(x, newest), targets, counts * decays, path)
    return found.loss, (found.entropies * counts).sum(), list(torch.split(found.right, sizes))


def _path(sizes: Sequence[int], every: Tensor | None, follows: Tensor, drafted: bool) -> Path:
    """Return how rows of steps of so many rows are one another's drafts; `every` as for `_scored`."""
    begins = tuple(_starts(sizes))
    before = [torch.arange(sizes[0], dtype=torch.int64)]
    for step in range(1, len(sizes)):
        earlier = torch.arange(sizes[step], dtype=torch.int64) + begins[step - 1]
        before.append(every if step == 1 and every is not None else earlier)
    return Path(begins, torch.cat(before), follows, drafted)
