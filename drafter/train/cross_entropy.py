"""Cross entropy over many candidates, with its gradient in the same pass.

The gradient of -sum_v t_v log softmax(z)_v by the logits z is softmax(z) - t: the pass that makes the logits has the
gradient at hand, and no logits need be kept, or made again, for a second pass. Liger's fused linear cross entropy does
the same (arXiv 2410.10989); here targets can be the teacher's distributions too, the loss can move towards the overlap
of the two distributions as it grows (arXiv 2602.23881), and a row can count as much as the drafts before it survive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 25  # logits at once: 64 MB of bfloat16
_BLOCK = 1 << 19  # float32 ones at once, so that they stay in the processor's cache


class Choices(NamedTuple):
    """Keep hard targets: `wanted` [rows], the candidates' count where a row has no target."""

    wanted: Tensor


class Teacher(NamedTuple):
    """Keep soft targets: row r's is the softmax of `matrix` [candidates, H] times `states` [n, H] at `at` [rows].

    Rows of one state share its logits. `wanted` as that of `Choices`. `temperature`: of the targets p, sharper below 1.
    `overlap`: with alpha = sum_v min(p_v, q_v), the overlap with the scored distribution q, and w = exp(-overlap *
    alpha) without gradient, the loss of a row is w * cross entropy + (1 - w) * (1 - alpha).
    """

    wanted: Tensor
    matrix: Tensor
    states: Tensor
    at: Tensor
    temperature: float = 1.0
    overlap: float = 0.0


@dataclass(frozen=True)
class Path:
    """Say how the rows are steps of drafts, for a row to count as much as the steps before it survive.

    `begins`: the first row of each step, ascending. `before` [rows]: the row of the same draft's step before; of no
    meaning in the first step. `tokens` [rows]: the place among the candidates of the token that the text has, which the
    next step is fed. `drafted`: a step survives where its likeliest candidate is that token, and counts 1; otherwise
    every step survives with the chance that the scored distribution gives the token.
    """

    begins: tuple[int, ...]
    before: Tensor
    tokens: Tensor
    drafted: bool

    def survive(self, alive: Tensor, part: slice, best: Tensor, chances: Tensor) -> None:
        """Set `alive` [rows] of the rows in `part`, whose earlier rows are set: the product of what the steps before
        count, by their likeliest candidates `best` [rows] and the `chances` [rows] of their tokens."""
        for step, begin in enumerate(self.begins):
            end = self.begins[step + 1] if step + 1 < len(self.begins) else len(alive)
            rows = slice(max(begin, part.start), min(end, part.stop))
            if rows.start >= rows.stop:
                continue
            if not step:
                alive[rows] = 1.0
                continue
            earlier = self.before[rows]
            passed = (best[earlier] == self.tokens[earlier]).float() if self.drafted else chances[earlier]
            alive[rows] = alive[earlier] * passed


class Scores(NamedTuple):
    """Keep the results of `scores`. `loss`: the weighted sum of `entropies` [rows], which have no gradient. `right`
    [rows] bool: whether the likeliest candidate is the wanted one. `alive` [rows]: what each row counted besides its
    weight."""

    loss: Tensor
    entropies: Tensor
    right: Tensor
    alive: Tensor


def scores(x: Tensor, matrix: Tensor, targets: Choices | Teacher, weights: Tensor, path: Path | None = None) -> Scores:
    """Score the logits `x` [rows, D] times `matrix` [candidates, D], whose products are bfloat16 under autocast.

    `weights` [rows] float32: of each row in the loss, which can be differentiated once by `x` and `matrix`. The
    gradients are made here, where gradients are enabled. With a `path` a row also counts as much as the steps before
    it survive, without a gradient by that.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.autocast("cpu", enabled=False):
        return Scores(*_scores(x, matrix, targets, weights, path, dtype, torch.is_grad_enabled()))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        targets: Choices | Teacher,
        weights: Tensor,
        path: Path | None,
        dtype: torch.dtype,
        learning: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses, entropies, chances = torch.empty(3, len(x), dtype=torch.float32)
        best, alive = torch.empty(len(x), dtype=torch.int64), torch.ones(len(x), dtype=torch.float32)
        by_x = torch.empty_like(x) if learning else None
        by_matrix: Tensor | None = None
        low, low_x = matrix.to(dtype), x.to(dtype)
        teacher = targets.matrix.to(dtype) if isinstance(targets, Teacher) else None
        size = max(1, _CHUNK // len(matrix))
        for part in (slice(at, min(at + size, len(x))) for at in range(0, len(x), size)):
            logits = F.linear(low_x[part], low)  # [r, candidates]
            tokens = None if path is None else path.tokens[part]
            if isinstance(targets, Teacher):
                assert teacher is not None
                at, back = torch.unique(targets.at[part], return_inverse=True)
                theirs = F.linear(targets.states[at].to(dtype), teacher)  # [n, candidates]
                found = _soften(logits, theirs, back, targets, tokens)
            else:
                found = _harden(logits, targets.wanted[part], tokens)
            losses[part], entropies[part], best[part], chances[part] = found
            if path is not None:
                path.survive(alive, part, best, chances)
            if by_x is None:
                continue
            # `logits` holds their gradients now. Weights are the factors of rows, here as they would be there.
            weight = (weights[part] * alive[part])[:, None]
            by_x[part] = (logits @ low).float() * weight
            piece = logits.t() @ (low_x[part] * weight).to(dtype)  # [candidates, D]
            by_matrix = piece.to(matrix.dtype) if by_matrix is None else by_matrix.add_(piece)
        ctx.gradients = by_x, by_matrix
        right = best == targets.wanted
        ctx.mark_non_differentiable(entropies, right, alive)
        return (losses * (weights * alive)).sum(), entropies, right, alive

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_x, by_matrix = ctx.gradients
        ctx.gradients = None  # the matrix's gradient becomes the parameter's own, if nothing else holds it
        if gradients[0] != 1:
            by_x, by_matrix = by_x * gradients[0], by_matrix * gradients[0]
        return by_x, by_matrix, None, None, None, None, None


_scores: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _Scores.apply


_Found = tuple[Tensor, Tensor, Tensor, Tensor]  # of rows: losses, cross entropies, likeliest, chances of tokens


def _soften(logits: Tensor, theirs: Tensor, back: Tensor, how: Teacher, tokens: Tensor | None) -> _Found:
    """Return what is found of the rows of `logits` [r, candidates]; replace the logits by their gradients.

    The target of row r is the softmax of `theirs` at back[r]. `tokens` [r]: whose chances are wanted; None: nobody's.
    """
    parts: list[_Found] = []
    size = max(1, _BLOCK // logits.shape[1])
    # once: fresh memory costs more here than the work in it
    room = torch.empty(3, size, logits.shape[1], dtype=torch.float32)
    for at in range(0, len(logits), size):
        block, source = logits[at : at + size], back[at : at + size]
        z, chances, target = room[:, : len(block)]
        z.copy_(theirs[source])
        if how.temperature != 1:
            z.div_(how.temperature)
        torch.softmax(z, dim=-1, out=target)
        z.copy_(block)
        inner = torch.mul(z, target, out=chances).sum(dim=-1)
        normalizer, best = _softmax(z, chances)
        entropy = normalizer - inner  # targets sum to 1
        followed = entropy if tokens is None else _chances_of(chances, tokens[at : at + size])
        loss = _overlapping(entropy, z, chances, target, how.overlap) if how.overlap else entropy
        parts.append((loss, entropy, best, followed))
        block.copy_(chances if how.overlap else chances.sub_(target))
    losses, entropies, likeliest, chance = (torch.cat(found) for found in zip(*parts, strict=True))
    return losses, entropies, likeliest, chance


def _overlapping(entropy: Tensor, room: Tensor, chances: Tensor, target: Tensor, rate: float) -> Tensor:
    """Return the losses [r] of `Teacher.overlap`, at `rate`, for `chances` q and `target` p [r, n]; put their gradients
    by the logits in `chances`. What is in `room` and `target` is lost.

    With m_v = 1 where q_v < p_v, the gradient of alpha by logit v is q_v (m_v - sum_u m_u q_u).
    """
    alpha = torch.minimum(chances, target, out=room).sum(dim=-1)
    w = torch.exp(-rate * alpha)
    below = torch.mul(chances, chances < target, out=room)  # q m
    inside = below.sum(dim=-1)  # [r]
    # w (q - p) - (1 - w) (q m - q inside) = (w + (1 - w) inside) q - w p - (1 - w) q m
    chances.mul_((w + (1 - w) * inside)[:, None]).sub_(target.mul_(w[:, None])).sub_(below.mul_((1 - w)[:, None]))
    return w * entropy + (1 - w) * (1 - alpha)


def _harden(logits: Tensor, wanted: Tensor, tokens: Tensor | None) -> _Found:
    """Do the same as `_soften`, with the tokens `wanted` [r] as targets; a row without a target has no loss."""
    parts: list[_Found] = []
    size = max(1, _BLOCK // logits.shape[1])
    room = torch.empty(2, size, logits.shape[1], dtype=torch.float32)
    for first in range(0, len(logits), size):
        block, label = logits[first : first + size], wanted[first : first + size]
        z, chances = room[:, : len(block)]
        normalizer, best = _softmax(z.copy_(block), chances)
        known = label < z.shape[1]
        at = torch.where(known, label, 0)[:, None]
        entropy = (normalizer - z.gather(1, at)[:, 0]) * known
        followed = entropy if tokens is None else _chances_of(chances, tokens[first : first + size])
        parts.append((entropy, entropy, best, followed))
        chances.scatter_add_(1, at, torch.full_like(at, -1, dtype=chances.dtype))
        block.copy_(chances.mul_(known[:, None]))
    losses, entropies, likeliest, chance = (torch.cat(found) for found in zip(*parts, strict=True))
    return losses, entropies, likeliest, chance


def _chances_of(chances: Tensor, tokens: Tensor) -> Tensor:
    """Return the chance of each row's token, [r]; 0 where it is no candidate."""
    known = tokens < chances.shape[1]
    return chances.gather(1, torch.where(known, tokens, 0)[:, None])[:, 0] * known


def _softmax(z: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """Put the softmax of z [r, n] in `chances`; return the logarithms [r] of its divisors, and the likeliest tokens."""
    torch.softmax(z, dim=-1, out=chances)
    top, best = z.max(dim=-1)
    # The likeliest one's chance is at least 1 / n: its logarithm is exact enough.
    return top - chances.gather(1, best[:, None])[:, 0].log(), best
