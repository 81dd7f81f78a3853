"""Floats that quantisation-aware training left on a lattice: each block of 32 is a step times whole numbers -8..7.

What: `fit_lattice` recovers the step of every block, and says which blocks lie on a lattice; `lattice_share` asks a few
rows first. Why not the rule of Q4_0, or the search of `fit_int4`: training chose steps that neither assumes, and only
about 60 % of blocks have a largest number of 8. With the recovered step 97 % of the weights are again the bfloat16
numbers that they were (`python -m eval.files.lattice`). Left out: lattices of other bits, and blocks of other sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels import BLOCK
from specdec.weights.fit import Natural

_REACH = 8  # the largest whole number of a block is at most this
_NEAR = 0.06  # of a step: bfloat16 moves the largest numbers by 0.02, and an estimate of the step by as much
_ORDER = (8, 7, 6, 5, 4, 3, 2, 1)  # largest whole numbers, those that trained blocks have most first
_ROWS, _FEW = 16, 64  # asked first: so many rows, and of their blocks so many before the others


def lattice_share(tensor: Tensor) -> float:
    """Return the share of blocks that lie on a lattice, in a few rows of `tensor` [N, K], of any float type."""
    count = min(_ROWS, max(1, len(tensor) // 64))
    ids = torch.arange(count, dtype=torch.int64) * (len(tensor) - 1) // max(1, count - 1)
    blocks = tensor.index_select(0, ids).float().view(-1, BLOCK).t()  # [32, B]
    few = blocks[:, :: max(1, blocks.shape[1] // _FEW)]
    return share if (share := _share(few)) < 0.5 else _share(blocks)


def _share(blocks: Tensor) -> float:
    step, _ = _steps(blocks.contiguous())
    used = blocks.abs().amax(0) > 0
    return float((step != 0)[used].float().mean()) if bool(used.any()) else 0.0


def fit_lattice(x: Tensor) -> tuple[Natural, Tensor]:
    """Fit 4-bit blocks without a minimum to x, float32 [R, K]; return them, and which of them lie on a lattice
    [R, K/32].

    A block that lies on none gets the step with the least squared error among a few. Values that float16 cannot hold
    become infinite or NaN.
    """
    # One block a column, as in `fit_minimum`.
    y = x.view(-1, BLOCK).t().contiguous()  # [32, B]
    step, codes = _steps(y)
    largest = y.abs().amax(0)
    resolved = (step != 0) | (largest == 0)
    if len(others := (~resolved).nonzero().flatten()):
        step[others], codes[:, others] = _least_error(y[:, others])
    # The least squares of w = step * code: bfloat16 rounded each weight by another amount.
    squares = (codes * codes).sum(0)
    step = torch.where(squares > 0, (codes * y).sum(0) / squares, step)
    step = torch.where(largest.isfinite(), step, torch.inf).half()
    values = (codes + 8).to(torch.uint8).t().reshape(x.shape)  # [R, K]
    shape = (x.shape[0], x.shape[1] // BLOCK)
    return (values, step.view(shape), None), resolved.view(shape)


def _steps(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a step for each block of y [32, B], 0 for those on no lattice, and the whole numbers [32, B] float32."""
    step, codes = y.new_zeros(y.shape[1]), torch.zeros_like(y)
    low, high = y.amin(0), y.amax(0)
    largest = torch.maximum(-low, high)
    signed = torch.where(high >= -low, -largest, largest)  # 8 is no code, and -8 is one
    left = largest.nonzero().flatten()
    for reach in _ORDER:
        if not len(left):
            break
        whole = left.numel() == y.shape[1]
        part = y if whole else y.index_select(1, left)
        top = (signed if reach == _REACH else largest)[left]
        scaled = part * (reach / top)
        near = scaled.round()
        found = (scaled.sub_(near).abs_().amax(0) < _NEAR) & (near.amax(0) < _REACH) & _has_float16(top / reach)
        at = left[found]
        if at.numel() == y.shape[1]:
            return top / reach, near
        step[at] = top[found] / reach
        codes[:, at] = near[:, found]
        left = left[~found]
    return step, codes


def _has_float16(step: Tensor) -> Tensor:
    """Return whether float16 holds each step as well as others: below 6e-5 it is coarse."""
    return (step.half().float() - step).abs() <= step.abs() * 2**-10


def _least_error(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step and the whole numbers of each block of y [32, B] with the least squared error among a few."""
    low, high = y.amin(0), y.amax(0)
    signed = torch.where(high >= -low, -high, -low)  # the value that becomes -8
    best = y.new_full((y.shape[1],), float("inf"))
    step, codes = torch.zeros_like(best), torch.zeros_like(y)
    for reach in (8.0, 7.5, 7.0):
        for top in (signed, -signed):
            tried = top / reach
            near = (y * torch.where(tried != 0, 1 / tried, 0.0)).round_().clamp_(-8, 7)
            squares = (near * near).sum(0)
            tried = torch.where(squares > 0, (near * y).sum(0) / squares, tried)
            error = (near * tried - y).square_().sum(0)
            better = error < best
            step, best = torch.where(better, tried, step), torch.where(better, error, best)
            codes = torch.where(better, near, codes)
    return step, codes
