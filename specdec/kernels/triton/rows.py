"""Make rows number by number: rows of packed embeddings, rotations, gated activations."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.blocks import BlockTensor
from specdec.kernels.forms import BLOCK
from specdec.kernels.triton.launch import jit, launch, rounded, tiles
from specdec.kernels.triton.product import ACTIVATIONS, activated, kernel_constants, kernel_parts

_NUMBERS = 1024  # that a program makes


def block_rows(ids: Tensor, w: BlockTensor, dtype: torch.dtype) -> Tensor:
    """Dequantise rows `ids` int64 [T] of packed weights -> [T, K] in dtype.

    An id that is not a row gives a row of NaN: to raise an error the host would have to wait for the device.
    """
    out = torch.empty(ids.shape[0], w.columns, dtype=dtype, device=w.device)
    blocks = w.columns // BLOCK
    grid = ids.shape[0], tiles(blocks, _NUMBERS // BLOCK)
    launch(_block_rows, grid, ids, *kernel_parts(w), out, w.rows, blocks, **kernel_constants(w), B=_NUMBERS // BLOCK)
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by cos and sin [T, D], halves convention -> [T, H, D]."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    rows, heads, width = x.shape
    half = 1 << (width // 2 - 1).bit_length()
    several = max(1, min(16, _NUMBERS // half))
    launch(_rope, (rows, tiles(heads, several)), x, cos, sin, out, heads, width // 2, H=several, P=half)
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up, both of one shape, in float32, then in the dtype of `gate`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    count = gate.numel()
    launch(_gated, (tiles(count, _NUMBERS),), gate, up, out, count, GELU=ACTIVATIONS.index(activation), M=_NUMBERS)
    return out


@jit
def _codes(q, at, lane, column, BITS: tl.constexpr):
    """Read the codes of columns [1, 32] of blocks of one row: int32 [B, 32]; 8 bits: less 128. `at` [B, 1]."""
    place = at + lane * 4 + column % 4
    if BITS == 8:
        return tl.load(q + place + column // 4 * 64).to(tl.int32) - 128
    codes = (tl.load(q + place + column % 16 // 4 * 64).to(tl.int32) >> (column // 16 * 4)) & 15
    if BITS == 5:
        ones = tl.load(q + at + 256 + column // 4 * 8 + lane // 2).to(tl.int32)
        codes |= ((ones >> (lane % 2 * 4 + column % 4).to(tl.int32)) & 1) << 4
    return codes


@jit
def _block_rows(
    ids, q, scale, minimum, table, out, outputs, blocks,
    BITS: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr, UNIT: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Expand B blocks of one wanted row into out [T, 32 * blocks]; NaN where there is no such row."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(ids + row)
    known = (wanted >= 0) & (wanted < outputs)
    wanted = tl.where(known, wanted, 0)
    b = tl.program_id(1) * B + tl.arange(0, B)
    mask = b < blocks
    block = wanted // 16 * blocks + tl.minimum(b, blocks - 1)
    lane, column = wanted % 16, tl.arange(0, 32)[None, :]
    codes = _codes(q, block[:, None] * (64 * BITS), lane, column, BITS)
    if TABLE:
        values = tl.load(table + codes).to(tl.float32)
    elif MINIMUM or BITS == 8:
        values = codes.to(tl.float32)
    else:
        values = (codes - (1 << (BITS - 1))).to(tl.float32)
    values = values * (tl.load(scale + block * 16 + lane).to(tl.float32) * UNIT)[:, None]
    if MINIMUM:
        values += tl.load(minimum + block * 16 + lane).to(tl.float32)[:, None]
    values = tl.where(known, values, float("nan"))
    tl.store(out + (row * blocks + b)[:, None] * 32 + column, rounded(values, out.dtype.element_ty), mask=mask[:, None])


@jit
def _rope(x, cos, sin, out, heads, half, H: tl.constexpr, P: tl.constexpr):
    """Rotate H heads of one row of x [T, heads, 2 * half] by cos and sin [T, 2 * half]."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H + tl.arange(0, H)
    column = tl.arange(0, P)
    there = column < half
    mask = (head < heads)[:, None] & there[None, :]
    at = (row * heads + head)[:, None] * (2 * half) + column[None, :]
    low = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + at + half, mask=mask, other=0.0).to(tl.float32)
    turn = row * (2 * half) + column
    cos_low = tl.load(cos + turn, mask=there, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + turn + half, mask=there, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + turn, mask=there, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + turn + half, mask=there, other=0.0).to(tl.float32)[None, :]
    dtype = out.dtype.element_ty
    tl.store(out + at, rounded(low * cos_low - high * sin_low, dtype), mask=mask)
    tl.store(out + at + half, rounded(high * cos_high + low * sin_high, dtype), mask=mask)


@jit
def _gated(gate, up, out, count, GELU: tl.constexpr, M: tl.constexpr):
    """Make M of the `count` numbers activation(gate) * up; a program for each M."""
    at = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    mask = at < count
    wide = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(activated(wide, GELU) * other, out.dtype.element_ty), mask=mask)
