"""What a head is trained to do: the K steps of a draft, from every position of a text at once.

Row r of a text stands for the draft that is made when token p = r + 1 is pending; the last rows, whose drafts would
run past the text, are left out. Step i of it gets token p + i - 1
(teacher forcing) and the head's own state of step i - 1, and should name the backbone's choice at position p + i - 1,
and bring forth the backbone's state there. The loss is

    sum over steps i of decay^(i - 1) * (cross entropy + feature_weight * SmoothL1(state / scale, hidden / scale))

with the weights that EAGLE-3 (arXiv 2503.01840) gives later steps. A choice that the head has no candidate for is left
out of the cross entropy, and counts as a miss. Sums, not means: who adds texts up divides by the number of rows of all
of them, on all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drafter.features import Features
from drafter.network import Network

_CHUNK = 1 << 24  # logits at once: 64 MB of float32


@dataclass(frozen=True)
class Recipe:
    """What the loss is made of.

    `soft`: the backbone's distribution over the candidates as target, not its choice. `deeper`: the share of rows that
    go on after the first step, chosen at random and counted for the others: what a first draft needs is most of what
    has to be learned, and costs a fraction of a whole unroll.
    """

    steps: int = 4
    deeper: float = 1.0
    decay: float = 0.8
    feature_weight: float = 0.3
    soft: bool = False


@dataclass(frozen=True)
class Candidates:
    """The tokens that a head can propose: `ids` [candidates] ascending, `slots` [vocab] their places (none: the count).

    `teacher` [candidates, backbone hidden]: their rows of the backbone's head, which soft targets are made with.
    """

    ids: Tensor
    slots: Tensor
    teacher: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, vocab: int, teacher: Tensor | None = None) -> Candidates:
        slots = torch.full((vocab,), len(ids))
        slots[ids] = torch.arange(len(ids))
        return cls(ids, slots, teacher)


class Losses(NamedTuple):
    """Sums over all `rows`, or what stands for them. `right` [rows that went on, K] bool: whether this draft of a row
    and all before it are right."""

    loss: Tensor
    cross_entropy: Tensor
    feature: Tensor
    rows: int
    right: Tensor


def unrolled(
    network: Network,
    embed: Callable[[Tensor], Tensor],
    texts: Sequence[Features],
    scale: float,
    candidates: Candidates,
    recipe: Recipe,
    seeds: Sequence[int] = (),
) -> Losses:
    """The loss of the drafts in `texts`, at every position from which a whole draft fits.

    `embed` [n] -> [n, backbone hidden]; `scale`: the size of a hidden state; `seeds`: for each
    text, of its rows that go on, where not all do.
    """
    rows = [torch.arange(1, 1 + rows_of(text, recipe.steps)) for text in texts]  # their tokens' positions
    total, entropies, features = (torch.zeros(()) for _ in range(3))
    state, alive, weight = torch.empty(0), torch.empty(0), 1.0
    right: list[Tensor] = []
    sight = None
    for step in range(recipe.steps):
        if step == 1 and recipe.deeper < 1:
            kept = [_some(len(part), recipe.deeper, seed) for part, seed in zip(rows, seeds, strict=True)]
            every = torch.cat([at + first for at, first in zip(kept, _firsts(rows), strict=True)])
            state, alive, right, sight = state[every], alive[every], [right[0][every]], None
            weight = sum(map(len, rows)) / len(every)
            rows = [part[at] for part, at in zip(rows, kept, strict=True)]
        if sight is None:
            sight = network.sight([(part, text.keys) for part, text in zip(rows, texts, strict=True)])
        if step == 0:
            before, *aux = (
                torch.cat([states[part - 1] for states, part in zip(pieces, rows, strict=True)]).float()  # [R, H]
                for pieces in zip(*(text.states(network.spec.aux_layers) for text in texts), strict=True)
            )
            state = network.first(before, aux)
            alive = torch.ones(len(state), dtype=torch.bool)
        newest, best, hidden = (
            torch.cat([piece[part + step] for piece, part in zip(pieces, rows, strict=True)])
            for pieces in zip(*((text.tokens, text.best, text.hidden) for text in texts), strict=True)
        )  # [R], [R], [R, H]
        hidden = hidden.float()
        x, state = network.step(embed(newest), state, sight)
        found, cross_entropy = _score(
            network, x, candidates.slots[newest], candidates.slots[best], hidden, candidates, recipe.soft
        )
        feature = F.smooth_l1_loss(state.float() / scale, hidden / scale, reduction="sum") / hidden.shape[1]
        total = total + weight * recipe.decay**step * (cross_entropy + recipe.feature_weight * feature)
        entropies, features = entropies + weight * cross_entropy.detach(), features + weight * feature.detach()
        alive = alive & found
        right.append(alive)
    count = sum(rows_of(text, recipe.steps) for text in texts)
    return Losses(total, entropies, features, count, torch.stack(right, dim=1))


def _some(count: int, share: float, seed: int) -> Tensor:
    """That share of 0 .. count - 1, at least one of them, ascending."""
    picked: Tensor = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[
        : max(1, round(share * count))
    ]
    return picked.sort().values


def _firsts(rows: Sequence[Tensor]) -> list[int]:
    """Where each text's rows begin among those of all."""
    return [0, *accumulate(len(part) for part in rows)][:-1]


def rows_of(text: Features, steps: int) -> int:
    """Positions p >= 1 of `text` from which all `steps` drafts have a label."""
    assert len(text) > steps, "a text must be longer than a draft"
    return len(text) - steps


def _score(
    network: Network,
    x: Tensor,
    newest: Tensor,
    wanted: Tensor,
    hidden: Tensor,
    candidates: Candidates,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    """For x [rows, hidden]: which rows name their wanted candidate, [rows] bool, and the cross entropy's sum.

    In chunks whose logits are made again for the gradient: those of a whole text and vocabulary would not fit.
    """
    none = len(candidates.ids)

    def part(x: Tensor, newest: Tensor, wanted: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = network.logits(x, newest).float()  # [rows, candidates]
        known = wanted < none
        if soft:
            assert candidates.teacher is not None
            target = F.softmax(hidden @ candidates.teacher.t(), dim=-1)
            loss = -(target * F.log_softmax(logits, dim=-1)).sum()
        else:
            loss = F.cross_entropy(logits, torch.where(known, wanted, -100), ignore_index=-100, reduction="sum")
        return logits.argmax(dim=-1) == wanted, loss

    right, losses = [], []
    size = max(1, _CHUNK // max(1, none))
    for pieces in zip(*(torch.split(tensor, size) for tensor in (x, newest, wanted, hidden)), strict=True):
        if len(x) <= size:
            found, loss = part(*pieces)
        else:
            found, loss = checkpoint(part, *pieces, use_reentrant=False)
        right.append(found)
        losses.append(loss)
    return torch.cat(right), torch.stack(losses).sum()
