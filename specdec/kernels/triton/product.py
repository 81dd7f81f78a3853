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
from specdec.kernels.forms import BLOCK, BlockForm, table_numbers
from specdec.kernels.triton.launch import INTERPRETED, jit, launch, rounded, tiles
from specdec.kernels.triton.quantise import Quantised, quantise

KERNEL_FORMS = frozenset(
    (
        BlockForm(4), BlockForm(4, minimum=True), BlockForm(5), BlockForm(5, minimum=True), BlockForm(8),
        BlockForm(4, table=True),
    )
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu_tanh")
# One tile for every number of rows: which sums a product of floats makes first depends on the tile's shape.
_DENSE = {"N": 64, "T": 32, "K": 32, "num_warps": 4, "num_stages": 3}


def block_linear(x: Tensor, w: BlockTensor) -> Tensor:
    """Multiply x [T, K] by packed weights of one of KERNEL_FORMS -> [T, N] in x.dtype."""
    return block_product(quantise(x), w, x.dtype)


def block_product(x: Quantised, w: BlockTensor, dtype: torch.dtype) -> Tensor:
    """Multiply quantised activations [T, K] by packed weights of one of KERNEL_FORMS -> [T, N] in `dtype`."""
    return _multiply(x, w, w, dtype, GATED=False, GELU=False)


def gated_product(x: Quantised, gate: BlockTensor, up: BlockTensor, activation: str, dtype: torch.dtype) -> Tensor:
    """Multiply by two matrices of one form, and return activation(x @ gate.T) * (x @ up.T) [T, I] in `dtype`.

    The bits are those of two products in `dtype` and `gated` after them.
    """
    assert (gate.form, gate.table, gate.rows) == (up.form, up.table, up.rows)
    return _multiply(x, gate, up, dtype, GATED=True, GELU=ACTIVATIONS.index(activation) == 1)


def _multiply(x: Quantised, w: BlockTensor, up: BlockTensor, dtype: torch.dtype, **how: bool) -> Tensor:
    rows = x.values.shape[0]
    out = torch.empty(rows, w.rows, dtype=dtype, device=x.values.device)
    shape = tile_shape(rows, w)
    grid = tiles(rows, shape["T"]), tiles(w.rows, shape["N"])
    parts = *kernel_parts(w), *kernel_parts(up)[:3]
    sizes = rows, w.rows, w.columns // BLOCK
    launch(_product, grid, *x, *parts, out, *sizes, **kernel_constants(w), **shape, **how)
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
    """Return the shape of a tile: N weight rows by T rows of x, K blocks of 32 columns a step.

    The shapes were chosen by the instructions of the compiled loop; no GPU was there to time them.
    """
    few = max(8, 1 << (rows - 1).bit_length()) if rows else 8
    blocks = w.columns // BLOCK
    steps = 4 if blocks % 4 == 0 else 2 if blocks % 2 == 0 else 1
    if few <= 16:
        return {"N": 16, "T": few, "K": steps, "num_warps": 1, "STAGES": 4}
    return {"N": 64, "T": min(few, 64), "K": steps, "num_warps": 4, "STAGES": 3}


def kernel_parts(w: BlockTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of `w` as the kernels take them: what it has not is the scale again, and never read."""
    table = w.scale if w.table is None else table_numbers(w.table, w.device)
    return w.q, w.scale, w.scale if w.minimum is None else w.minimum, table


def kernel_constants(w: BlockTensor) -> dict[str, Any]:
    """Return what kernels are compiled for, of the form of `w`."""
    return {"BITS": w.bits, "MINIMUM": w.minimum is not None, "TABLE": w.table is not None, "UNIT": w.unit}


@jit
def _tile_codes(q, BITS: tl.constexpr, G: tl.constexpr):
    """Read the codes of one block for G groups of 16 rows: int8 [16 * G, 32]; 8 bits: less 128.

    `q` [G]: where the lines of the block are. They are read from front to back, and put in their places in registers.
    """
    if BITS == 8:
        lines = tl.load(q[:, None] + tl.arange(0, 512)[None, :]) ^ 0x80
        lines = tl.permute(tl.reshape(lines, [G, 8, 16, 4]), (0, 2, 1, 3))  # [G, R, J, I]
        return tl.reshape(lines, [16 * G, 32]).to(tl.int8, bitcast=True)
    lines = tl.load(q[:, None] + tl.arange(0, 256)[None, :])
    low = lines & 15
    high = lines >> 4
    if BITS == 5:
        low |= _bits(q + 256, G) << 4
        high |= _bits(q + 288, G) << 4
    halves = tl.reshape(tl.join(low, high), [G, 4, 16, 4, 2])  # [G, J, R, I, H]
    codes = tl.reshape(tl.permute(halves, (0, 2, 4, 1, 3)), [16 * G, 32])
    return codes.to(tl.int8, bitcast=True)


@jit
def _bits(q, G: tl.constexpr):
    """Read 256 bits at q [G], each as a byte: uint8 [G, 256]. Bit i of byte n is of byte 8n + i of the lines."""
    ones = tl.load(q[:, None] + tl.arange(0, 32)[None, :])
    return tl.reshape((ones[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1, [G, 256])


@jit
def _add_term(
    total, a, s, sums, q, scale, minimum, table, b,
    BITS: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr, UNIT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add the term of block `b` to total [N, T]: a int8 [32, T], s float32 [T], sums int32 [T].

    `q`, `scale`, `minimum` [N / 16]: where the first blocks of the groups are.
    """
    codes = _tile_codes(q + b * (64 * BITS), BITS, N // 16)
    if TABLE:
        codes = tl.load(table + codes.to(tl.int32))
    start = tl.zeros(total.shape, tl.int32)
    if not (MINIMUM or TABLE or BITS == 8):
        start -= (sums * (1 << (BITS - 1)))[None, :]  # the codes' zero, for all columns at once
    dot = tl.dot(codes, a, start, out_dtype=tl.int32).to(tl.float32)
    row = tl.arange(0, 16)[None, :]
    d = tl.reshape(tl.load((scale + b * 16)[:, None] + row), [N]).to(tl.float32) * UNIT
    term = (s[None, :] * d[:, None]) * dot
    if MINIMUM:
        low = tl.reshape(tl.load((minimum + b * 16)[:, None] + row), [N]).to(tl.float32)
        term += low[:, None] * (s * sums.to(tl.float32))[None, :]
    return total + term


@jit
def _activations(values, scale, sums, mask):
    """Read a block of some rows: int8 [32, T], scale and sums [T]; zeros where there is no row. Pointers [T]."""
    a = tl.load(values[None, :] + tl.arange(0, 32)[:, None], mask=mask[None, :], other=0)
    return a, tl.load(scale, mask=mask, other=0.0), tl.load(sums, mask=mask, other=0)


@jit
def _first_blocks(outputs, blocks, N: tl.constexpr):
    """Return the first block of each group of this program's rows: int64 [N / 16]."""
    group = tl.program_id(1) * (N // 16) + tl.arange(0, N // 16)
    # the last tile may reach past the last group: there it reads the last group again, and stores nothing
    return tl.minimum(group, (outputs - 1) // 16).to(tl.int64) * blocks


@jit
def _store_tile(out, n, t, rows, outputs, total):
    """Store total [N, T] at out [rows, outputs]."""
    mask = (n < outputs)[:, None] & (t < rows)[None, :]
    tl.store(out + t.to(tl.int64)[None, :] * outputs + n[:, None], rounded(total, out.dtype.element_ty), mask=mask)


@jit
def _product(
    values, scales, sums, q, scale, minimum, table, q_up, scale_up, minimum_up, out, rows, outputs, blocks,
    BITS: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr, UNIT: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Multiply T quantised rows by N rows of packed weights into out [rows, outputs], K blocks a step, in the blocks'
    order; GATED: by two matrices, with the activation and the product of both. A program for each tile."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    n = tl.program_id(1) * N + tl.arange(0, N)
    mask = t < rows
    first, from_row = _first_blocks(outputs, blocks, N), t.to(tl.int64) * blocks
    values, scales, sums = values + from_row * 32, scales + from_row, sums + from_row
    q, scale, minimum = q + first * (64 * BITS), scale + first * 16, minimum + first * 16
    q_up, scale_up, minimum_up = q_up + first * (64 * BITS), scale_up + first * 16, minimum_up + first * 16
    total = tl.zeros([N, T], tl.float32)
    up = tl.zeros([N, T], tl.float32)
    for step in tl.range(0, blocks // K, num_stages=STAGES):
        for k in tl.static_range(K):
            b = step * K + k
            a, s, summed = _activations(values + b * 32, scales + b, sums + b, mask)
            total = _add_term(total, a, s, summed, q, scale, minimum, table, b, BITS, MINIMUM, TABLE, UNIT, N)
            if GATED:
                up = _add_term(up, a, s, summed, q_up, scale_up, minimum_up, table, b, BITS, MINIMUM, TABLE, UNIT, N)
    if GATED:
        gate = rounded(total, out.dtype.element_ty).to(tl.float32)
        total = activated(gate, GELU) * rounded(up, out.dtype.element_ty).to(tl.float32)
    _store_tile(out, n, t, rows, outputs, total)


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
    """Multiply T rows of x [rows, columns] by N rows of w into out [rows, outputs], K columns a step; a program for
    each tile."""
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
