"""Quantise activations to int8 for each block of 32 columns, by the rule of `specdec/kernels/reference.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.forms import BLOCK
from specdec.kernels.reference import TINY
from specdec.kernels.triton.launch import jit, launch, tiles

_BLOCKS = 64  # of activations that a program quantises
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: a small float32 that is added rounds to a whole number, half to even
_MAGIC_BITS = tl.constexpr(0x4B400000)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_TINY = tl.constexpr(TINY)


class Quantised(NamedTuple):
    """Hold activations as blocks: `values` int8 [T, K], `scale` float32 [T, K/32] and `sums` int32 [T, K/32], of the
    values of a block."""

    values: Tensor
    scale: Tensor
    sums: Tensor


def empty_quantised(rows: int, columns: int, device: torch.device) -> Quantised:
    """Return memory for quantised activations [rows, columns]."""
    values = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scale = torch.empty(rows, columns // BLOCK, dtype=torch.float32, device=device)
    return Quantised(values, scale, torch.empty_like(scale, dtype=torch.int32))


def quantise(x: Tensor) -> Quantised:
    """Quantise activations x [T, K], K a multiple of 32, of any float type."""
    x = x.contiguous()
    rows, columns = x.shape
    out = empty_quantised(rows, columns, x.device)
    blocks = out.scale.numel()
    launch(_quantise, (tiles(blocks, _BLOCKS),), x, *out, blocks, M=_BLOCKS)
    return out


@jit
def quantised_blocks(x):
    """Quantise x float32 [M, 32], a block a row -> whole numbers int32 [M, 32], scale [M], sum [M]."""
    # the bits of |x|, as whole numbers, have the order of |x|; NaN and infinity come last
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    finite = bits < _INFINITY_BITS
    usable = finite & (largest >= _TINY)
    safe = tl.where(usable, largest, 1.0)
    inverse = tl.div_rn(tl.full(safe.shape, 127.0, tl.float32), safe)
    rounded = x * inverse[:, None] + _MAGIC
    whole = tl.where(usable[:, None], rounded.to(tl.int32, bitcast=True) - _MAGIC_BITS, 0)
    scale = tl.where(usable, tl.div_rn(safe, tl.full(safe.shape, 127.0, tl.float32)), 0.0)
    return whole, tl.where(finite, scale, float("nan")), tl.sum(whole, axis=1)


@jit
def store_quantised(whole, scale, total, values_at, scale_at, sums_at, mask):
    """Store blocks whole int32 [M, 32]; the pointers [M] are those of the blocks."""
    tl.store(values_at[:, None] + tl.arange(0, 32)[None, :], whole.to(tl.int8), mask=mask[:, None])
    tl.store(scale_at, scale, mask=mask)
    tl.store(sums_at, total, mask=mask)


@jit
def _quantise(x, values, scale, sums, blocks, M: tl.constexpr):
    """Quantise M of the `blocks` of 32 numbers that x has; a program for each M."""
    at = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    mask = at < blocks
    block = tl.load(x + at[:, None] * 32 + tl.arange(0, 32)[None, :], mask=mask[:, None], other=0.0)
    whole, step, total = quantised_blocks(block.to(tl.float32))
    store_quantised(whole, step, total, values + at * 32, scale + at, sums + at, mask)
