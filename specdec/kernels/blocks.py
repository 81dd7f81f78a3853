"""Block-quantised weights in the one layout that torch and C++ share.

A weight matrix [N, K] is cut into blocks of 32 columns; a block has 4- or 8-bit integers, a float16 scale
and, for 4 bits, an optional float16 minimum. Sixteen rows are interleaved four columns at a time, so that
64 consecutive bytes are what one 512-bit dot-product instruction (VNNI `vpdpbusd`: 16 lanes of 4 bytes) eats.

    4 bit  q uint8 [N/16, K/32, 4, 16, 4]  byte (g, b, j, r, i) is row 16g+r;
                                           low nibble column 32b+4j+i, high nibble column 32b+16+4j+i
    8 bit  q uint8 [N/16, K/32, 8, 16, 4]  byte (g, b, j, r, i) = value + 128, row 16g+r, column 32b+4j+i
    scale, minimum  float16 [N/16, K/32, 16]

    weight = q * scale + minimum (4 bit with minimum), (q - 8) * scale (4 bit), (q - 128) * scale (8 bit)

N is padded to a multiple of 16 with rows of scale zero. Left out: other block sizes, and minimums for 8 bits;
GGUF formats that need them are converted by the reader in `specdec/weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
GROUP = 16


@dataclass(frozen=True)
class BlockTensor:
    """A quantised [rows, columns] matrix; the fields have the layout in the module docstring."""

    q: Tensor
    scale: Tensor
    minimum: Tensor | None
    bits: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.columns % BLOCK or self.columns <= 0 or self.rows <= 0:
            raise ValueError(
                f"a block tensor has 4 or 8 bits, rows, and columns in multiples of {BLOCK}; "
                f"got {self.bits} bits, {self.rows} x {self.columns}"
            )
        groups, blocks = -(-self.rows // GROUP), self.columns // BLOCK
        shape = (groups, blocks, self.bits, GROUP, 4)
        if tuple(self.q.shape) != shape or self.q.dtype != torch.uint8 or not self.q.is_contiguous():
            raise ValueError(f"q must be contiguous uint8 {shape}, got {self.q.dtype} {tuple(self.q.shape)}")
        if self.minimum is not None and self.bits == 8:
            raise ValueError("8-bit blocks have no minimum; use 4 bits, or fold the minimum into the values")
        for name, part in (("scale", self.scale), ("minimum", self.minimum)):
            if part is None:
                continue
            if tuple(part.shape) != (groups, blocks, GROUP) or part.dtype != torch.float16:
                raise ValueError(f"{name} must be float16 {(groups, blocks, GROUP)}, got {tuple(part.shape)}")
            if not part.is_contiguous() or part.device != self.q.device:
                raise ValueError(f"{name} must be contiguous and on the device of q ({self.q.device})")

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors together."""
        return self.q.nbytes + self.scale.nbytes + (0 if self.minimum is None else self.minimum.nbytes)

    @property
    def device(self) -> torch.device:
        return self.q.device

    def to(self, device: torch.device | str) -> BlockTensor:
        return self.moved(lambda part: part.to(device))

    def moved(self, move: Callable[[Tensor], Tensor]) -> BlockTensor:
        """The same matrix, each part where `move` puts it."""
        minimum = None if self.minimum is None else move(self.minimum)
        return BlockTensor(move(self.q), move(self.scale), minimum, self.bits, self.rows, self.columns)


def pack_blocks(values: Tensor, scale: Tensor, minimum: Tensor | None, bits: int) -> BlockTensor:
    """Interleave a quantised matrix.

    values [N, K]: integers 0..15 (4 bits) or -128..127 (8 bits); scale and minimum [N, K/32], any float
    dtype, rounded to float16. Raises ValueError for a shape or value that the layout cannot hold.
    """
    if bits not in (4, 8):
        raise ValueError(f"blocks have 4 or 8 bits, not {bits}")
    if values.dim() != 2 or values.shape[1] % BLOCK or 0 in values.shape:
        raise ValueError(f"values must be [N, K] with K a multiple of {BLOCK}, got {tuple(values.shape)}")
    if values.dtype.is_floating_point:
        raise ValueError(f"values must be integers, got {values.dtype}; quantise them first")
    rows, columns = values.shape
    low, high = (0, 15) if bits == 4 else (-128, 127)
    smallest, largest = values.aminmax()
    if int(smallest) < low or int(largest) > high:
        raise ValueError(f"{bits}-bit values must lie in {low}..{high}, got {int(smallest)}..{int(largest)}")
    blocks, padding = columns // BLOCK, -rows % GROUP
    raw = values.to(torch.uint8) if bits == 4 else (values.to(torch.int8).view(torch.uint8) ^ 0x80)
    raw = torch.nn.functional.pad(raw, (0, 0, 0, padding))
    groups = raw.shape[0] // GROUP
    if bits == 4:
        # [G, R, B, half, J, I]: the halves of a block share bytes
        split = raw.view(groups, GROUP, blocks, 2, 4, 4)
        raw = split[:, :, :, 0] | (split[:, :, :, 1] << 4)  # [G, R, B, 4, I]
    q = raw.view(groups, GROUP, blocks, bits, 4).permute(0, 2, 3, 1, 4).contiguous()  # [G, B, J, R, I]
    return BlockTensor(
        q,
        _pack_scale(scale, "scale", rows, blocks),
        None if minimum is None else _pack_scale(minimum, "minimum", rows, blocks),
        bits,
        rows,
        columns,
    )


def unpack_blocks(w: BlockTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `pack_blocks`: values [N, K] (uint8 0..15 or int8), scale and minimum float16 [N, K/32]."""
    groups = w.q.shape[0]
    raw = w.q.permute(0, 3, 1, 2, 4)  # [G, R, B, J, I]
    if w.bits == 4:
        raw = torch.stack((raw & 15, raw >> 4), dim=3)  # [G, R, B, half, J, I]
    values = raw.reshape(groups * GROUP, w.columns)[: w.rows]  # [N, K]
    if w.bits == 8:
        values = (values ^ 0x80).view(torch.int8)
    minimum = None if w.minimum is None else _unpack_scale(w.minimum, w.rows)
    return values.contiguous(), _unpack_scale(w.scale, w.rows), minimum


def _pack_scale(part: Tensor, name: str, rows: int, blocks: int) -> Tensor:
    if tuple(part.shape) != (rows, blocks):
        raise ValueError(f"{name} must be [N, K/32] = {(rows, blocks)}, got {tuple(part.shape)}")
    half = part.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{name} does not fit float16 (at most 65504, no NaN); rescale the tensor")
    half = torch.nn.functional.pad(half, (0, 0, 0, -rows % GROUP))
    return half.view(-1, GROUP, blocks).transpose(1, 2).contiguous()  # [G, B, R]


def _unpack_scale(part: Tensor, rows: int) -> Tensor:
    return part.transpose(1, 2).reshape(-1, part.shape[1])[:rows].contiguous()  # [N, B]
