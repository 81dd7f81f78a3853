"""How floats become blocks of 32 inputs, of 4, 5 or 8 bits: values, a scale, and at 4 and 5 bits a minimum.

Why a minimum: at the same speed it removes the error of blocks that are not centred. Why the search: against plain
rounding from minimum to maximum it removes 12 % of the squared error of Gaussian weights. Left out: calibration with
activations (GPTQ, AWQ), other block sizes, and float8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels import BLOCK

Natural = tuple[Tensor, Tensor, Tensor | None]
"""Blocks in plain order: values [R, K] (uint8, or int8 for 8 bits), scale [R, K/32], minimum [R, K/32] or None."""
NaturalHalves = Natural | tuple[Tensor, Tensor, Tensor | None, Tensor]
"""The same, and perhaps what `specdec.kernels.pack_blocks` calls `sub` [R, K/16]."""

_SHRINK = (1.0, 0.93, 0.86)  # ranges tried for a block with a minimum, as shares of maximum - minimum


def fit_int8(x: Tensor) -> Natural:
    """Fit symmetric 8-bit blocks to x, float32 [R, K]; scales that float16 cannot hold come out as infinite."""
    blocks = x.view(x.shape[0], -1, BLOCK)  # [R, K/32, 32]
    low, high = torch.aminmax(blocks, dim=-1)  # [R, K/32]
    largest = torch.maximum(-low, high)
    scale = _raise_to_reach(_half(largest / 127), largest, 127.5)
    values = (blocks * _inverse(scale)[..., None]).round_().clamp_(-127, 127)
    return values.to(torch.int8).view(x.shape), scale.half(), None


def fit_int4(x: Tensor) -> Natural:
    """Fit asymmetric 4-bit blocks to x, float32 [R, K]; values that float16 cannot hold come out as infinite or NaN."""
    return fit_minimum(x, 4)


def fit_minimum(x: Tensor, bits: int) -> Natural:
    """Fit blocks of `bits` bits with a minimum to x, float32 [R, K]; values that float16 cannot hold become infinite or
    NaN.

    For each share of the range: round, refit scale and minimum to the rounded values by least squares, and keep the
    pair (in float16) with the smallest squared error. Rounding once more can only lower that error.
    """
    top = 2**bits - 1
    # One block a column: sums over a block then run along contiguous rows, twice as fast as over rows of 32.
    y = x.view(-1, BLOCK).t().contiguous()  # [32, B]
    low, high = y.amin(0), y.amax(0)  # [B]
    middle = (low + high) / 2
    y -= middle  # centred, so that the sums below do not cancel for blocks far from zero
    sum_y = y.sum(0)
    scale = minimum = error = torch.empty(0, dtype=torch.float32)
    q, product = torch.empty_like(y), torch.empty_like(y)
    for share in _SHRINK:
        range_ = (high - low) * share
        first = _half(middle - range_ / 2 if share < 1 else low)
        step = _half(range_ / top)
        if share == 1:
            step = _raise_to_reach(step, high - first, top + 0.5)
        _round(y, step, first - middle, top, q)
        sum_q = q.sum(0)
        sum_qy = torch.mul(q, y, out=product).sum(0)
        sum_qq = torch.mul(q, q, out=product).sum(0)
        spread = BLOCK * sum_qq - sum_q * sum_q
        fitted = _half(torch.where(spread > 0, (BLOCK * sum_qy - sum_q * sum_y) / spread, step))
        fitted_first = _half((sum_y - fitted * sum_q) / BLOCK + middle)
        for s, m in ((step, first), (fitted, fitted_first)):
            offset = m - middle
            # sum (q s + offset - y)^2, without sum y^2
            squared = s * (s * sum_qq - 2 * sum_qy + 2 * offset * sum_q)
            squared += offset * (BLOCK * offset - 2 * sum_y)
            if not error.numel():
                scale, minimum, error = s, m, squared
                continue
            better = squared < error
            scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
            error = torch.where(better, squared, error)
    _round(y, scale, minimum - middle, top, q)
    values = q.to(torch.uint8).t().reshape(x.shape)  # [R, K]
    shape = (x.shape[0], x.shape[1] // BLOCK)
    return values, scale.half().view(shape), minimum.half().view(shape)


def split_halves(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return a scale for each 32 inputs, float32 [R, K/32], and a factor of it for each 16, int8 [R, K/16], of `scales`
    float32 [R, K/16].

    Of two scales the larger one is 64 to 127 steps, and the smaller one is rounded to them. Steps are powers of two, so
    that scales of four bits, as e4m3 has them, stay what they are unless one is more than eight times the other.
    """
    pairs = scales.view(len(scales), -1, 2)  # [R, K/32, 2]
    step = torch.exp2(torch.floor(torch.log2(pairs.abs().amax(-1).clamp(min=2**-100))) - 6)
    return step, torch.round(pairs / step[..., None]).clamp_(-127, 127).to(torch.int8).flatten(-2)


def _round(y: Tensor, scale: Tensor, minimum: Tensor, top: int, out: Tensor) -> None:
    inverse = _inverse(scale)
    torch.mul(y, inverse, out=out).sub_(minimum * inverse).round_().clamp_(0, top)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, 1 / scale, 0.0)  # a block without extent has scale 0 and values 0


def _raise_to_reach(scale: Tensor, extent: Tensor, steps: float) -> Tensor:
    """Return the scale, one float16 step up where `steps * scale` misses `extent`: float16 is coarse below 6e-5."""
    short = (scale * steps < extent).to(torch.int16)
    return (scale.half().view(torch.int16) + short).view(torch.float16).float()
