"""Norm rows by their root mean square, and quantise what comes out in the same kernel.

The sum of squares is the reference's halving tree, so the bits are the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.forms import BLOCK
from specdec.kernels.triton.launch import jit, launch, rounded, tiles
from specdec.kernels.triton.quantise import Quantised, empty_quantised, quantised_blocks, store_quantised

_NUMBERS = 2048  # that a program norms at least: short rows go several to a program


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm x [..., D]: x / sqrt(mean(x^2) + eps) * weight [D], in float32, then in x.dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    shape = _tile_shape(width)
    grid = (tiles(rows, shape["R"]),)
    scale = x if weight is None else weight.contiguous()
    launch(_rms_norm, grid, x, scale, out, rows, width, eps, WEIGHT=weight is not None, **shape)
    return out


def norm_quantise(x: Tensor, weight: Tensor | None, eps: float) -> Quantised:
    """Quantise `rms_norm(x, weight, eps)`, x [T, K], in one kernel and to the same bits."""
    x = x.contiguous()
    rows, width = x.shape
    assert width % BLOCK == 0
    out = empty_quantised(rows, width, x.device)
    scale = x if weight is None else weight.contiguous()
    shape = _tile_shape(width)
    grid = (tiles(rows, shape["R"]),)
    launch(_norm_quantise, grid, x, scale, *out, rows, width, eps, WEIGHT=weight is not None, **shape)
    return out


def add_norm_quantise(
    residual: Tensor, x: Tensor, post: Tensor | None, weight: Tensor | None, eps: float, scalar: Tensor | None = None
) -> tuple[Tensor, Quantised]:
    """Add x, normed with `post` where there is one, to residual [T, K], and multiply by `scalar` [1]; return that, and
    it normed and quantised.

    The bits are those of the same ops one by one, each of which rounds to the dtype of `residual` and x.
    """
    x, residual = x.contiguous(), residual.contiguous()
    assert x.dtype is residual.dtype
    rows, width = x.shape
    added, out = torch.empty_like(x), empty_quantised(rows, width, x.device)
    after, scale, factor = (x if part is None else part.contiguous() for part in (post, weight, scalar))
    shape = _tile_shape(width)
    launch(
        _add_norm_quantise, (tiles(rows, shape["R"]),),
        residual, x, after, scale, factor, added, *out, rows, width, eps,
        POST=post is not None, WEIGHT=weight is not None, SCALAR=scalar is not None, **shape,
    )  # fmt: skip
    return added, out


def _tile_shape(width: int) -> dict[str, Any]:
    """Return R rows of a program and their width P, a power of two."""
    padded = 1 << (width - 1).bit_length()
    return {"R": max(1, min(16, _NUMBERS // padded)), "P": padded, "num_warps": 4 if padded <= 4096 else 8}


@jit
def squares(x, R: tl.constexpr, P: tl.constexpr):
    """Sum the squares of x float32 [R, P] by halves: number i adds number i + P/2, and so on -> [R]."""
    total = x * x
    for level in tl.static_range(1, 31):
        if (P >> level) > 0:
            total = tl.sum(tl.reshape(total, [R, 2, P >> level]), axis=1)
    return tl.reshape(total, [R])


@jit
def normed(x, scale, column, width, eps, WEIGHT: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """Norm x float32 [R, P], whose columns past `width` are zero; `scale`: where the weight is."""
    mean = tl.div_rn(squares(x, R, P), tl.full([R], 1.0, tl.float32) * width)
    x = x * tl.div_rn(tl.full([R], 1.0, tl.float32), tl.sqrt_rn(mean + eps))[:, None]
    if WEIGHT:
        x = x * tl.load(scale + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    return x


@jit
def _rows(rows, width, R: tl.constexpr, P: tl.constexpr):
    """Return the rows of this program [R], the columns [P], the places of its numbers [R, P], and which are there."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, P)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    return row, column, at, (row < rows)[:, None] & (column < width)[None, :]


@jit
def _rms_norm(x, scale, out, rows, width, eps, WEIGHT: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """Norm R rows of x [rows, width] into out, in the type of x; a program for each R rows."""
    _row, column, at, mask = _rows(rows, width, R, P)
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    wide = normed(wide, scale, column, width, eps, WEIGHT, R, P)
    tl.store(out + at, rounded(wide, x.dtype.element_ty), mask=mask)


@jit
def _store_blocks(x, row, rows, width, values, scale, sums, R: tl.constexpr, P: tl.constexpr):
    """Quantise x float32 [R, P] and store it, `width` numbers of each row."""
    whole, step, total = quantised_blocks(tl.reshape(x, [R * P // 32, 32]))
    block = tl.arange(0, P // 32)
    at = row.to(tl.int64)[:, None] * (width // 32) + block[None, :]
    mask = tl.reshape((row < rows)[:, None] & (block < width // 32)[None, :], [R * P // 32])
    at = tl.reshape(at, [R * P // 32])
    store_quantised(whole, step, total, values + at * 32, scale + at, sums + at, mask)


@jit
def _norm_quantise(
    x, weight, values, scale, sums, rows, width, eps, WEIGHT: tl.constexpr, R: tl.constexpr, P: tl.constexpr
):
    """Norm R rows of x [rows, width], round them to its type and quantise them; a program for each R rows."""
    row, column, at, mask = _rows(rows, width, R, P)
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    wide = rounded(normed(wide, weight, column, width, eps, WEIGHT, R, P), x.dtype.element_ty)
    _store_blocks(wide.to(tl.float32), row, rows, width, values, scale, sums, R, P)


@jit
def _add_norm_quantise(
    residual, x, post, weight, scalar, added, values, scale, sums, rows, width, eps,
    POST: tl.constexpr, WEIGHT: tl.constexpr, SCALAR: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Add R rows of x [rows, width], normed with `post`, to `residual`, times `scalar`: store that as `added`, and what
    `_norm_quantise` makes of it; a program for each R rows."""
    row, column, at, mask = _rows(rows, width, R, P)
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if POST:
        wide = rounded(normed(wide, post, column, width, eps, True, R, P), x.dtype.element_ty).to(tl.float32)
    whole = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32) + wide
    whole = rounded(whole, x.dtype.element_ty)
    if SCALAR:
        whole = rounded(whole.to(tl.float32) * tl.load(scalar).to(tl.float32), x.dtype.element_ty)
    tl.store(added + at, whole, mask=mask)
    wide = normed(whole.to(tl.float32), weight, column, width, eps, WEIGHT, R, P)
    wide = rounded(wide, x.dtype.element_ty)
    _store_blocks(wide.to(tl.float32), row, rows, width, values, scale, sums, R, P)
