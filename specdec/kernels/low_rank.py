"""Low-rank parts of weight matrices (LoRA): y += up @ (scale * (down @ x)), kept apart from the weights.

A part of a matrix [N, K] is `down` [R, K] and `up` [N, R], in float32 or bfloat16, laid out so that the kernels read
both from front to back. R is the rank, rounded up to a multiple of four with zeros, which add nothing.

    down  [R/4, K/16, 4, 16]  entry (c, b, r, i) is rank 4c+r, column 16b+i; K is padded to a multiple of 16
    up    [N/16, R, 16]       entry (g, r, i) is row 16g+i, rank r; N is padded to a multiple of 16

`low_rank` defines the results, as `reference.py` does for the other ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16  # columns, or rows, that are summed side by side
RANKS = 4  # ranks whose sums are made at once
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Hold a low-rank part of a matrix [outputs, inputs]; `down` and `up` have the layout of the module docstring."""

    down: Tensor
    up: Tensor
    scale: float
    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        rank, blocks, groups = self.up.shape[1], -(-self.inputs // LANES), -(-self.outputs // LANES)
        shapes = (rank // RANKS, blocks, RANKS, LANES), (groups, rank, LANES)
        if (tuple(self.down.shape), tuple(self.up.shape)) != shapes or rank % RANKS or not rank:
            raise ValueError(f"a low-rank part is {shapes}, got {tuple(self.down.shape)} and {tuple(self.up.shape)}")
        if self.down.dtype not in _DTYPES or self.up.dtype is not self.down.dtype:
            raise ValueError(f"a low-rank part is float32 or bfloat16, got {self.down.dtype} and {self.up.dtype}")
        assert self.down.is_contiguous() and self.up.is_contiguous()

    @property
    def rank(self) -> int:
        """Return R, with what it was rounded up by."""
        return self.up.shape[1]

    @property
    def nbytes(self) -> int:
        """Count the bytes of both tensors together."""
        return self.down.nbytes + self.up.nbytes

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return `down` [R, inputs] and `up` [outputs, R] as plain matrices: a copy, made once."""
        down = self.down.permute(0, 2, 1, 3).reshape(self.rank, -1)[:, : self.inputs]  # [R, K]
        up = self.up.transpose(1, 2).reshape(-1, self.rank)[: self.outputs]  # [N, R]
        return down.contiguous(), up.contiguous()

    def to(self, device: torch.device | str) -> LowRank:
        """Return the same part on `device`."""
        return LowRank(self.down.to(device), self.up.to(device), self.scale, self.outputs, self.inputs)


def pack_low_rank(down: Tensor, up: Tensor, scale: float) -> LowRank:
    """Lay out a low-rank part: down [r, K] and up [N, r], floats of any dtype.

    It is kept in bfloat16 where that holds every value, else in float32.
    """
    (rank, inputs), outputs = down.shape, up.shape[0]
    assert up.shape[1] == rank
    exact = all(torch.equal(each.bfloat16().float(), each.float()) for each in (down, up))
    dtype = torch.bfloat16 if exact else torch.float32
    down = F.pad(down.to(dtype), (0, -inputs % LANES, 0, -rank % RANKS))
    up = F.pad(up.to(dtype), (0, -rank % RANKS, 0, -outputs % LANES))
    down = down.view(-1, RANKS, down.shape[1] // LANES, LANES).transpose(1, 2).contiguous()  # [R/4, K/16, 4, 16]
    up = up.view(-1, LANES, up.shape[1]).transpose(1, 2).contiguous()  # [N/16, R, 16]
    return LowRank(down, up, scale, outputs, inputs)


def low_rank(x: Tensor, part: LowRank) -> Tensor:
    """Multiply x [T, K] by a low-rank part [N, K] -> up @ (scale * (down @ x)) [T, N] in x.dtype.

    Arithmetic, in float32 and without a fused multiply-add: sixteen sums for each rank, of columns 16b + i in the order
    of b; the halving tree over them (lane i adds lane i + 8, then + 4, + 2, + 1), times scale; then for each output the
    terms of the ranks in their order, each sum beginning at zero.
    """
    if x.device.type != "cpu":
        down, up = (each.to(x.dtype) for each in part.matrices)
        return F.linear(F.linear(x, down) * part.scale, up)
    blocks = F.pad(x.float(), (0, -x.shape[1] % LANES)).view(x.shape[0], -1, 1, 1, LANES)  # [T, B, 1, 1, 16]
    lanes = x.new_zeros((x.shape[0], *part.down.shape[::2], LANES), dtype=torch.float32)  # [T, R/4, 4, 16]
    for block, down in zip(blocks.unbind(1), part.down.float().unbind(1), strict=True):
        lanes += block * down
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    low = lanes.view(x.shape[0], part.rank, 1, 1) * part.scale  # [T, R, 1, 1]
    out = x.new_zeros((x.shape[0], part.up.shape[0], LANES), dtype=torch.float32)  # [T, N/16, 16]
    for one, up in zip(low.unbind(1), part.up.float().unbind(1), strict=True):
        out += one * up
    return out.view(x.shape[0], -1)[:, : part.outputs].to(x.dtype).contiguous()  # [T, N]
