"""What a head is trained to do: the K steps of a draft, from every position of a text at once.

Row r of a text stands for the draft that is made when token p = r + 1 is pending. Step i of it gets token p + i - 1
(teacher forcing) and the head's own state of step i - 1, and should name the backbone's choice at position p + i - 1,
and bring forth the backbone's state there. The loss is

    sum over steps i of decay^(i - 1) * (cross entropy + feature_weight * SmoothL1(state / scale, hidden / scale))

with the weights that EAGLE-3 (arXiv 2503.01840) gives later steps. A choice that the head has no candidate for is left
out of the cross entropy, and counts as a miss. Sums, not means: who adds texts up divides by the number of rows of all
of them, on all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drafter.features import Features
from drafter.network import Network

_CHUNK = 1 << 23  # logits at once: 32 MB of float32


@dataclass(frozen=True)
class Recipe:
    """What the loss is made of. `soft`: the backbone's distribution over the candidates as target, not its choice."""

    steps: int = 4
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
    """Sums over the rows of a text. `accepted` [K]: rows whose first i drafts are all right; `rows` [K]."""

    loss: Tensor
    cross_entropy: Tensor
    feature: Tensor
    accepted: Tensor
    rows: Tensor


def unrolled(
    network: Network,
    embed: Callable[[Tensor], Tensor],
    text: Features,
    scale: float,
    candidates: Candidates,
    recipe: Recipe,
) -> Losses:
    """The loss of every draft in `text`; `embed` [n] -> [n, backbone hidden], `scale`: the size of a hidden state."""
    n = len(text)
    assert n > recipe.steps, "a text must be longer than a draft"
    hidden = text.hidden.float()
    embedded = embed(text.tokens)  # [n, H]
    slots = candidates.slots[text.tokens]  # [n]
    positions = torch.arange(1, n, device=hidden.device)[None]  # [1, R]
    sights = network.sight(positions, n)
    state = hidden[None, :-1]  # [1, R, H]
    alive = torch.ones(n - 1, dtype=torch.bool, device=hidden.device)
    total, entropies, features = (torch.zeros((), device=hidden.device) for _ in range(3))
    accepted, rows = [], []
    for step in range(recipe.steps):
        count = n - 1 - step  # rows p = 1 .. n - 1 - step have a token p + step
        if step:
            sights = {kind: sight.rows(count) for kind, sight in sights.items()}
            state, alive = state[:, :count], alive[:count]
        ahead = slice(1 + step, n)
        x, state = network.step(embedded[None, ahead], state, sights, text.keys)
        right, cross_entropy = _score(
            network, x[0], slots[ahead], candidates.slots[text.best[ahead]], hidden[ahead], candidates, recipe.soft
        )
        feature = F.smooth_l1_loss(state[0] / scale, hidden[ahead] / scale, reduction="sum") / hidden.shape[1]
        total = total + recipe.decay**step * (cross_entropy + recipe.feature_weight * feature)
        entropies, features = entropies + cross_entropy.detach(), features + feature.detach()
        alive = alive & right
        accepted.append(alive.sum())
        rows.append(count)
    return Losses(total, entropies, features, torch.stack(accepted), torch.tensor(rows))


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
