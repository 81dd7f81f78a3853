"""Cross entropy over many candidates, with its gradient in the same pass.

The gradient of -sum_v t_v log softmax(z)_v by the logits z is softmax(z) - t: the pass that makes the logits has the
gradient at hand, and no logits need be kept, or made again, for a second pass. Liger's fused linear cross entropy does
the same (arXiv 2410.10989); here targets can be the teacher's distributions too.
"""

from __future__ import annotations

from collections.abc import Callable
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

    Rows of one state share its logits. `wanted` as that of `Choices`.
    """

    wanted: Tensor
    matrix: Tensor
    states: Tensor
    at: Tensor


class Scores(NamedTuple):
    """Keep the results of `scores`. `loss`: the weighted sum of `entropies` [rows], which have no gradient. `right`
    [rows] bool: whether the likeliest candidate is the wanted one."""

    loss: Tensor
    entropies: Tensor
    right: Tensor


def scores(x: Tensor, matrix: Tensor, targets: Choices | Teacher, weights: Tensor) -> Scores:
    """Score the logits `x` [rows, D] times `matrix` [candidates, D], whose products are bfloat16 under autocast.

    `weights` [rows] float32: of each row in the loss, which can be differentiated once by `x` and `matrix`. The
    gradients are made here, where gradients are enabled.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.autocast("cpu", enabled=False):
        return Scores(*_scores(x, matrix, targets, weights, dtype, torch.is_grad_enabled()))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        targets: Choices | Teacher,
        weights: Tensor,
        dtype: torch.dtype,
        learning: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        entropies, right = torch.empty(len(x), dtype=torch.float32), torch.empty(len(x), dtype=torch.bool)
        by_x = torch.empty_like(x) if learning else None
        by_matrix: Tensor | None = None
        low, low_x = matrix.to(dtype), x.to(dtype)
        teacher = targets.matrix.to(dtype) if isinstance(targets, Teacher) else None
        size = max(1, _CHUNK // len(matrix))
        for part in (slice(at, at + size) for at in range(0, len(x), size)):
            logits = F.linear(low_x[part], low)  # [r, candidates]
            wanted = targets.wanted[part]
            if isinstance(targets, Teacher):
                assert teacher is not None
                at, back = torch.unique(targets.at[part], return_inverse=True)
                theirs = F.linear(targets.states[at].to(dtype), teacher)  # [n, candidates]
                found = _soften(logits, theirs, back, wanted)
            else:
                found = _harden(logits, wanted)
            entropies[part], right[part] = found
            if by_x is None:
                continue
            # `logits` holds their gradients now. Weights are the factors of rows, here as they would be there.
            weight = weights[part, None]
            by_x[part] = (logits @ low).float() * weight
            piece = logits.t() @ (low_x[part] * weight).to(dtype)  # [candidates, D]
            by_matrix = piece.to(matrix.dtype) if by_matrix is None else by_matrix.add_(piece)
        ctx.gradients = by_x, by_matrix
        ctx.mark_non_differentiable(entropies, right)
        return (entropies * weights).sum(), entropies, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_x, by_matrix = ctx.gradients
        ctx.gradients = None  # the matrix's gradient becomes the parameter's own, if nothing else holds it
        if gradients[0] != 1:
            by_x, by_matrix = by_x * gradients[0], by_matrix * gradients[0]
        return by_x, by_matrix, None, None, None, None


_scores: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Scores.apply


def _soften(logits: Tensor, theirs: Tensor, back: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entropies [r] and hits [r] of `logits` [r, candidates]; replace the logits by their gradients.

    The target of row r is the softmax of `theirs` at back[r].
    """
    entropies, right = [], []
    size = max(1, _BLOCK // logits.shape[1])
    # once: fresh memory costs more here than the work in it
    room = torch.empty(3, size, logits.shape[1], dtype=torch.float32)
    parts = (torch.split(tensor, size) for tensor in (logits, back, wanted))
    for block, source, label in zip(*parts, strict=True):
        z, chances, target = room[:, : len(block)]
        torch.softmax(z.copy_(theirs[source]), dim=-1, out=target)
        z.copy_(block)
        inner = torch.mul(z, target, out=chances).sum(dim=-1)
        normalizer, best = _softmax(z, chances)
        entropies.append(normalizer - inner)  # targets sum to 1
        right.append(best == label)
        block.copy_(chances.sub_(target))
    return torch.cat(entropies), torch.cat(right)


def _harden(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same as `_soften`, with the tokens `wanted` [r] as targets; a row without a target has no loss."""
    entropies, right = [], []
    size = max(1, _BLOCK // logits.shape[1])
    room = torch.empty(2, size, logits.shape[1], dtype=torch.float32)
    for block, label in zip(torch.split(logits, size), torch.split(wanted, size), strict=True):
        z, chances = room[:, : len(block)]
        normalizer, best = _softmax(z.copy_(block), chances)
        known = label < z.shape[1]
        at = torch.where(known, label, 0)[:, None]
        entropies.append((normalizer - z.gather(1, at)[:, 0]) * known)
        right.append(best == label)
        chances.scatter_add_(1, at, torch.full_like(at, -1, dtype=chances.dtype))
        block.copy_(chances.mul_(known[:, None]))
    return torch.cat(entropies), torch.cat(right)


def _softmax(z: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """Put the softmax of z [r, n] in `chances`; return the logarithms [r] of its divisors, and the likeliest tokens."""
    torch.softmax(z, dim=-1, out=chances)
    top, best = z.max(dim=-1)
    # The likeliest one's chance is at least 1 / n: its logarithm is exact enough.
    return top - chances.gather(1, best[:, None])[:, 0].log(), best
