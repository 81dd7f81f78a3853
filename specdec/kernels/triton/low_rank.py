"""Multiply by low-rank parts of matrices, to the bits of `specdec/kernels/low_rank.py`: sixteen sums for each rank, in
the order of the columns, the halving tree over them, and the ranks in their order for each output."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.low_rank import LANES, RANKS, LowRank
from specdec.kernels.triton.launch import jit, launch, rounded, tiles

_DOWN = {"T": 4, "num_warps": 4}
_UP = {"T": 8, "N": 64, "num_warps": 4}


def low_rank(x: Tensor, part: LowRank) -> Tensor:
    """Multiply x [T, K] by a low-rank part [N, K] -> up @ (scale * (down @ x)) [T, N] in x.dtype."""
    x = x.contiguous()
    rows, columns = x.shape
    low = torch.empty(rows, part.rank, dtype=torch.float32, device=x.device)
    out = torch.empty(rows, part.outputs, dtype=x.dtype, device=x.device)
    grid = tiles(rows, _DOWN["T"]), part.rank // RANKS
    launch(_down, grid, x, part.down, low, rows, columns, part.rank, part.scale, tiles(columns, LANES), **_DOWN)
    grid = tiles(rows, _UP["T"]), tiles(part.outputs, _UP["N"])
    launch(_up, grid, low, part.up, out, rows, part.outputs, part.rank, **_UP)
    return out


@jit
def _down(x, down, low, rows, columns, rank, scale, blocks, T: tl.constexpr):
    """Make four ranks of low [T, R] for some rows."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    row = (tl.program_id(0) * T + tl.arange(0, T * 4) // 4).to(tl.int64)
    lane = tl.arange(0, 16)
    r = tl.arange(0, 4)
    four = tl.arange(0, T * 4) % 4
    total = tl.zeros([T * 4, 16], tl.float32)
    from_down = down + tl.program_id(1).to(tl.int64) * blocks * 64
    for b in tl.range(0, blocks):
        column = b * 16 + lane
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        part = tl.load(x + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(from_down + b * 64 + four[:, None] * 16 + lane[None, :]).to(tl.float32)
        total += part * weight
    for level in tl.static_range(1, 5):
        total = tl.sum(tl.reshape(total, [T * 4, 2, 16 >> level]), axis=1)
    total = tl.reshape(total, [T, 4]) * scale
    at = t.to(tl.int64)[:, None] * rank + tl.program_id(1) * 4 + r[None, :]
    tl.store(low + at, total, mask=(t < rows)[:, None])


@jit
def _up(low, up, out, rows, outputs, rank, T: tl.constexpr, N: tl.constexpr):
    """Multiply T rows of low [rows, rank] by N rows of `up` into out [rows, outputs], rank by rank."""
    t = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
    n = tl.program_id(1) * N + tl.arange(0, N)
    group = tl.minimum(n // 16, (outputs - 1) // 16).to(tl.int64)
    total = tl.zeros([T, N], tl.float32)
    for r in tl.range(0, rank):
        weight = tl.load(up + (group * rank + r) * 16 + n % 16).to(tl.float32)
        total += tl.load(low + t * rank + r, mask=t < rows, other=0.0)[:, None] * weight[None, :]
    mask = (t < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out + t[:, None] * outputs + n[None, :], rounded(total, out.dtype.element_ty), mask=mask)
