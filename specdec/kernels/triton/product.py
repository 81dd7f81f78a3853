"""Multiply by packed weights (`BlockTensor`) and by plain matrices.

`block_linear` has the bits of the reference (see `specdec/kernels/reference.py`): activations are quantised to int8 for
each block of 32 columns, a block's dot is a whole number and so exact however it is summed, and the terms of the blocks
are added in their order. So tiles may have any shape, and it is chosen by the number of rows. `dense_linear` sums
floats: its tile is the same for every number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.blocks import BlockTensor
from specdec.kernels.forms import BLOCK, TABLES, BlockForm
from specdec.kernels.triton.launch import INTERPRETED, jit, launch, rounded, tiles
from specdec.kernels.triton.quantise import Quantised, quantise

FORMS = frozenset(
    (
        BlockForm(4), BlockForm(4, minimum=True), BlockForm(5), BlockForm(5, minimum=True), BlockForm(8),
        BlockForm(4, table=True),
    )
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu_tanh")
# One tile for every number of rows: which sums a product of floats makes first depends on the tile's shape.
_DENSE = {"N": 64, "T": 32, "K": 32, "num_warps": 4, "num_stages": 3}


def block_linear(x: Tensor, w: BlockTensor) -> Tensor:
    """Multiply x [T, K] by packed weights of one of FORMS -> [T, N] in x.dtype."""
    return block_product(quantise(x), w, x.dtype)


def block_product(x: Quantised, w: BlockTensor, dtype: torch.dtype) -> Tensor:
    """Multiply quantised activations [T, K] by packed weights of one of FORMS -> [T, N] in `dtype`."""
    rows = x.values.shape[0]
    out = torch.empty(rows, w.rows, dtype=dtype, device=x.values.device)
    shape = tile_shape(rows, w)
    grid = tiles(rows, shape["T"]), tiles(w.rows, shape["N"])
    launch(_product, grid, *x, *kernel_parts(w), out, rows, w.rows, w.columns // BLOCK, **kernel_constants(w), **shape)
    return out


def gated_product(x: Quantised, gate: BlockTensor, up: BlockTensor, activation: str, dtype: torch.dtype) -> Tensor:
    """Multiply by two matrices of one form, and return activation(x @ gate.T) * (x @ up.T) [T, I] in `dtype`.

    The bits are those of two products in `dtype` and `gated` after them.
    """
    assert (gate.form, gate.table, gate.rows) == (up.form, up.table, up.rows)
    rows = x.values.shape[0]
    out = torch.empty(rows, gate.rows, dtype=dtype, device=x.values.device)
    shape = tile_shape(rows, gate)
    grid = tiles(rows, shape["T"]), tiles(gate.rows, shape["N"])
    parts = *kernel_parts(gate), *kernel_parts(up)[:3]
    launch(
        _gated_product, grid, *x, *parts, out, rows, gate.rows, gate.columns // BLOCK,
        **kernel_constants(gate), **shape, GELU=ACTIVATIONS.index(activation),
    )  # fmt: skip
    return out


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [T, K] by w [N, K] and add bias [N] -> [T, N] in x.dtype, in which w is read and the product rounded
    before the bias is added."""
    x, w = x.contiguous(), w.to(x.dtype).contiguous()
    rows, columns, outputs = *x.shape, w.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    grid = tiles(rows, _DENSE["T"]), tiles(outputs, _DENSE["N"])
    added = x if bias is None else bias.contiguous()
    launch(_dense, grid, x, w, added, out, rows, outputs, columns, BIAS=bias is not None, WIDE=INTERPRETED, **_DENSE)
    return out


def tile_shape(rows: int, w: BlockTensor) -> dict[str, int]:
    """Return the shape of a tile: N weight rows by T rows of x, K blocks of 32 columns a step."""
    few = max(8, 1 << (rows - 1).bit_length()) if rows else 8
    blocks = w.columns // BLOCK
    steps = 4 if blocks % 4 == 0 else 2 if blocks % 2 == 0 else 1
    if few <= 16:
        return {"N": 16, "T": few, "K": steps, "num_warps": 1, "num_stages": 4}
    return {"N": 64, "T": min(few, 64), "K": steps, "num_warps": 4, "num_stages": 3}


def kernel_parts(w: BlockTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of `w` as the kernels take them: what it has not is the scale again, and never read."""
    table = w.scale if w.table is None else _table(w.table, w.device)
    return w.q.view(torch.int32), w.scale, w.scale if w.minimum is None else w.minimum, table


def kernel_constants(w: BlockTensor) -> dict[str, Any]:
    """Return what kernels are compiled for, of the form of `w`."""
    return {"BITS": w.bits, "MINIMUM": w.minimum is not None, "TABLE": w.table is not None, "UNIT": w.unit}


_tables: dict[tuple[str, torch.device], Tensor] = {}


def _table(name: str, device: torch.device) -> Tensor:
    """Return the numbers of a table on `device`: a copy, made once."""
    if (name, device) not in _tables:
        _tables[name, device] = TABLES[name].numbers.to(device)
    return _tables[name, device]


@jit
def _bytes(word):
    """Take words int32 [N, 4] apart into bytes, lowest first: int32 [N, 4, 2, 2]."""
    even = tl.join(word & 255, (word >> 16) & 255)
    odd = tl.join((word >> 8) & 255, (word >> 24) & 255)
    return tl.join(even, odd)


@jit
def _spread(four):
    """Take the lowest four bits of words int32 [N, 4] apart: [N, 4, 2, 2], 0 or 1."""
    return tl.join(tl.join(four & 1, (four >> 2) & 1), tl.join((four >> 1) & 1, (four >> 3) & 1))


@jit
def block_codes(q, at, lane, BITS: tl.constexpr, N: tl.constexpr):
    """Read the codes of one block for N rows, in pairs: int32 [N, 32]; 8 bits: less 128.

    `q`: words; `at` [N]: where the block of a row begins; `lane` [N]: which of its group's rows a row is.
    """
    chunk = tl.arange(0, 4)
    place = at[:, None] + chunk[None, :] * 16 + lane[:, None]
    lines = _bytes(tl.load(q + place))
    if BITS == 8:
        low = lines - 128
        high = _bytes(tl.load(q + place + 64)) - 128
    else:
        low = lines & 15
        high = lines >> 4
    if BITS == 5:
        fifth = at[:, None] + 64 + chunk[None, :] * 2 + (lane // 8)[:, None]
        shift = (4 * (lane % 8))[:, None]
        low += _spread(tl.load(q + fifth) >> shift) << 4
        high += _spread(tl.load(q + fifth + 8) >> shift) << 4
    return tl.reshape(tl.join(low, high), [N, 32])


@jit
def _add_term(
    total, a, s, sums, q, scale, minimum, table, at, lane, scale_at,
    BITS: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr, UNIT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add the term of one block to total [N, T]: a int8 [32, T], s and sums float32 [T]."""
    codes = block_codes(q, at, lane, BITS, N)
    if TABLE:
        weights = tl.load(table + codes)
    elif MINIMUM or BITS == 8:
        weights = codes.to(tl.int8)
    else:
        weights = (codes - (1 << (BITS - 1))).to(tl.int8)
    dot = tl.dot(weights, a, out_dtype=tl.int32).to(tl.float32)
    d = tl.load(scale + scale_at).to(tl.float32) * UNIT
    term = (s[None, :] * d[:, None]) * dot
    if MINIMUM:
        low = tl.load(minimum + scale_at).to(tl.float32)
        term += low[:, None] * (s * sums)[None, :]
    return total + term


@jit
def _activations(values, scale, sums, t, b, rows, blocks):
    """Read block `b` of rows t [T]: int8 [32, T], scale and sums [T]; zeros where there is no row."""
    at = t.to(tl.int64) * blocks + b
    mask = t < rows
    a = tl.load(values + at[None, :] * 32 + tl.arange(0, 32)[:, None], mask=mask[None, :], other=0)
    return a, tl.load(scale + at, mask=mask, other=0.0), tl.load(sums + at, mask=mask, other=0.0)


@jit
def _store_tile(out, n, t, rows, outputs, total):
    """Store total [N, T] at out [rows, outputs]."""
    mask = (n < outputs)[:, None] & (t < rows)[None, :]
    tl.store(out + t.to(tl.int64)[None, :] * outputs + n[:, None], rounded(total, out.dtype.element_ty), mask=mask)


@jit
def _product(
    values, scales, sums, q, scale, minimum, table, out, rows, outputs, blocks,
    BITS: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr, UNIT: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * T + tl.arange(0, T)
    n = tl.program_id(1) * N + tl.arange(0, N)
    # the last tile may reach past the last group: there it reads the last group again, and stores nothing
    group = tl.minimum(n // 16, (outputs - 1) // 16).to(tl.int64) * blocks
    lane = n % 16
    total = tl.zeros([N, T], tl.float32)
    for step in tl.range(0, blocks // K):
        for k in tl.static_range(K):
            b = step * K + k
            a, s, summed = _activations(values, scales, sums, t, b, rows, blocks)
            at, scale_at = (group + b) * (16 * BITS), (group + b) * 16 + lane
            total = _add_term(
                total, a, s, summed, q, scale, minimum, table, at, lane, scale_at, BITS, MINIMUM, TABLE, UNIT, N
            )
    _store_tile(out, n, t, rows, outputs, total)


@jit
def _gated_product(
    values, scales, sums, q, scale, minimum, table, q_up, scale_up, minimum_up, out, rows, outputs, blocks,
    BITS: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr, UNIT: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, K: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * T + tl.arange(0, T)
    n = tl.program_id(1) * N + tl.arange(0, N)
    group = tl.minimum(n // 16, (outputs - 1) // 16).to(tl.int64) * blocks
    lane = n % 16
    gate = tl.zeros([N, T], tl.float32)
    up = tl.zeros([N, T], tl.float32)
    for step in tl.range(0, blocks // K):
        for k in tl.static_range(K):
            b = step * K + k
            a, s, summed = _activations(values, scales, sums, t, b, rows, blocks)
            at, scale_at = (group + b) * (16 * BITS), (group + b) * 16 + lane
            gate = _add_term(
                gate, a, s, summed, q, scale, minimum, table, at, lane, scale_at, BITS, MINIMUM, TABLE, UNIT, N
            )
            up = _add_term(
                up, a, s, summed, q_up, scale_up, minimum_up, table, at, lane, scale_at, BITS, MINIMUM, TABLE, UNIT, N
            )
    gate = rounded(gate, out.dtype.element_ty).to(tl.float32)
    up = rounded(up, out.dtype.element_ty).to(tl.float32)
    _store_tile(out, n, t, rows, outputs, activated(gate, GELU) * up)


@jit
def activated(x, GELU: tl.constexpr):
    """Return silu(x), or gelu(x) with tanh as x / (1 + exp(-2u)), which cancels nothing, x float32."""
    u = x
    if GELU:
        u = x * (1.0 + 0.044715 * x * x) * (2.0 * 0.7978845608028654)
    return tl.div_rn(x, 1.0 + tl.exp(-u))


@jit
def _dense(
    x, w, bias, out, rows, outputs, columns,
    BIAS: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * T + tl.arange(0, T)
    n = tl.program_id(1) * N + tl.arange(0, N)
    from_x = x + t.to(tl.int64)[None, :] * columns
    from_w = w + n.to(tl.int64)[:, None] * columns
    total = tl.zeros([N, T], tl.float32)
    for start in tl.range(0, columns, K):
        k = start + tl.arange(0, K)
        a = tl.load(from_w + k[None, :], mask=(n < outputs)[:, None] & (k < columns)[None, :], other=0.0)
        b = tl.load(from_x + k[:, None], mask=(t < rows)[None, :] & (k < columns)[:, None], other=0.0)
        if WIDE:  # the interpreter multiplies the bits of bfloat16 numbers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    if BIAS:
        total = rounded(total, out.dtype.element_ty).to(tl.float32)
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    _store_tile(out, n, t, rows, outputs, total)
