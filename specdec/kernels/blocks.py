"""Block-quantised weights in the one layout that torch and C++ share.

A weight matrix [N, K] is cut into blocks of 32 columns; a block has 4-, 5- or 8-bit integers, a float16 scale
and, for 4 and 5 bits, an optional float16 minimum. Sixteen rows are interleaved four columns at a time: 64 weights of
a byte each (a chunk) are what one 512-bit dot-product instruction (VNNI `vpdpbusd`: 16 lanes of 4 bytes) eats. Chunk c
of a block's eight is columns 32b+4c+i, i = 0..3, of all sixteen rows.

    4 bit  q uint8 [N/16, K/32, 4, 16, 4]  byte (g, b, j, r, i) is row 16g+r;
                                           low nibble column 32b+4j+i, high nibble column 32b+16+4j+i
    5 bit  q uint8 [N/16, K/32, 5, 16, 4]  j = 0..3 as for 4 bits; the 64 bytes of j = 4 are the fifth bits: bit 4r+i
                                           of the eight bytes (little endian) at 8c is row 16g+r, column 32b+4c+i
    8 bit  q uint8 [N/16, K/32, 8, 16, 4]  byte (g, b, j, r, i) = value + 128, row 16g+r, column 32b+4j+i
    scale, minimum  float16 [N/16, K/32, 16]

    weight = q * scale + minimum (with minimum), (q - zero) * scale (without); zero is 8, 16 or 128

Why the fifth bits lie like this: eight bytes are a chunk's 64-bit mask for AVX-512. N is padded to a multiple of 16
with rows of scale zero. Left out: other block sizes, and minimums for 8 bits; GGUF formats that need them are converted
by the reader in `specdec/weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # inputs that share one scale
GROUP = 16  # rows that are interleaved
VALUES = {4: (0, 15), 5: (0, 31), 8: (-128, 127)}  # smallest and largest value, by bits
_WITH_MINIMUM = (4, 5)
_BITS = "4, 5 or 8 bits"


@dataclass(frozen=True)
class BlockTensor:
    """Hold a quantised [rows, columns] matrix; the fields have the layout in the module docstring."""

    q: Tensor
    scale: Tensor
    minimum: Tensor | None
    bits: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.bits not in VALUES or self.columns % BLOCK or self.columns <= 0 or self.rows <= 0:
            raise ValueError(
                f"a block tensor has {_BITS}, rows, and columns in multiples of {BLOCK}; "
                f"got {self.bits} bits, {self.rows} x {self.columns}"
            )
        groups, blocks = -(-self.rows // GROUP), self.columns // BLOCK
        shape = (groups, blocks, self.bits, GROUP, 4)
        if tuple(self.q.shape) != shape or self.q.dtype != torch.uint8 or not self.q.is_contiguous():
            raise ValueError(f"q must be contiguous uint8 {shape}, got {self.q.dtype} {tuple(self.q.shape)}")
        if self.minimum is not None and self.bits not in _WITH_MINIMUM:
            raise ValueError(
                f"{self.bits}-bit blocks have no minimum; use 4 or 5 bits, or fold the minimum into the values"
            )
        for name, part in (("scale", self.scale), ("minimum", self.minimum)):
            if part is None:
                continue
            if tuple(part.shape) != (groups, blocks, GROUP) or part.dtype != torch.float16:
                raise ValueError(f"{name} must be float16 {(groups, blocks, GROUP)}, got {tuple(part.shape)}")
            if not part.is_contiguous() or part.device != self.q.device:
                raise ValueError(f"{name} must be contiguous and on the device of q ({self.q.device})")

    @property
    def nbytes(self) -> int:
        """Count the bytes of the three tensors together."""
        return self.q.nbytes + self.scale.nbytes + (0 if self.minimum is None else self.minimum.nbytes)

    @property
    def zero(self) -> int:
        """Return the stored integer that means a weight of zero where there is no minimum."""
        return 1 << (self.bits - 1)

    @property
    def device(self) -> torch.device:
        """Return the device of the three tensors."""
        return self.q.device

    def to(self, device: torch.device | str) -> BlockTensor:
        """Return the same matrix on `device`."""
        return self.move(lambda part: part.to(device))

    def move(self, move: Callable[[Tensor], Tensor]) -> BlockTensor:
        """Return the same matrix, each tensor where `move` puts it."""
        minimum = None if self.minimum is None else move(self.minimum)
        return BlockTensor(move(self.q), move(self.scale), minimum, self.bits, self.rows, self.columns)


def pack_blocks(values: Tensor, scale: Tensor, minimum: Tensor | None, bits: int) -> BlockTensor:
    """Interleave a quantised matrix.

    values [N, K]: integers 0..15 (4 bits), 0..31 (5 bits) or -128..127 (8 bits); scale and minimum [N, K/32], any
    float dtype, rounded to float16. Raises ValueError for a shape or value that the layout cannot hold.
    """
    if bits not in VALUES:
        raise ValueError(f"blocks have {_BITS}, not {bits}")
    if values.dim() != 2 or values.shape[1] % BLOCK or 0 in values.shape:
        raise ValueError(f"values must be [N, K] with K a multiple of {BLOCK}, got {tuple(values.shape)}")
    if values.dtype.is_floating_point:
        raise ValueError(f"values must be integers, got {values.dtype}; quantise them first")
    rows, columns = values.shape
    low, high = VALUES[bits]
    smallest, largest = values.aminmax()
    if int(smallest) < low or int(largest) > high:
        raise ValueError(f"{bits}-bit values must lie in {low}..{high}, got {int(smallest)}..{int(largest)}")
    blocks, padding = columns // BLOCK, -rows % GROUP
    raw = values.to(torch.uint8) if low == 0 else values.to(torch.int8).view(torch.uint8) ^ 0x80
    raw = torch.nn.functional.pad(raw, (0, 0, 0, padding))
    chunks = raw.view(-1, GROUP, blocks, 8, 4).permute(0, 2, 3, 1, 4)  # [G, B, 8, R, I]
    return BlockTensor(
        _join(chunks, bits),
        _pack_scale(scale, "scale", rows, blocks),
        None if minimum is None else _pack_scale(minimum, "minimum", rows, blocks),
        bits,
        rows,
        columns,
    )


def unpack_blocks(w: BlockTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `pack_blocks`: values [N, K] (uint8, or int8 for 8 bits), scale and minimum float16 [N, K/32]."""
    raw = split(w.q, w.bits).permute(0, 3, 1, 2, 4)  # [G, R, B, 8, I]
    values = raw.reshape(-1, w.columns)[: w.rows]  # [N, K]
    if VALUES[w.bits][0] < 0:
        values = (values ^ 0x80).view(torch.int8)
    minimum = None if w.minimum is None else _unpack_scale(w.minimum, w.rows)
    return values.contiguous(), _unpack_scale(w.scale, w.rows), minimum


def split(q: Tensor, bits: int) -> Tensor:
    """Unpack the integers of some groups, chunk by chunk: q [G, B, bits, R, I] -> uint8 [G, B, 8, R, I]."""
    if bits == 8:
        return q
    nibbles = _nibbles(q[:, :, :4])
    if bits == 4:
        return nibbles
    pairs = q[:, :, 4].view(*q.shape[:2], 8, GROUP // 2, 1)  # a byte has four bits of each of two rows
    fours = torch.cat((pairs & 15, pairs >> 4), dim=-1).flatten(3)  # [G, B, 8, R]
    return nibbles | _fifth(fours)


def split_rows(w: BlockTensor, ids: Tensor) -> Tensor:
    """Unpack the integers of rows `ids` [T], chunk by chunk: uint8 [T, B, 8, I]."""
    group, lane = ids // GROUP, ids % GROUP
    raw = w.q[group, :, :, lane]  # [T, B, bits, I]
    if w.bits == 8:
        return raw
    nibbles = _nibbles(raw[:, :, :4])
    if w.bits == 4:
        return nibbles
    pairs = w.q[:, :, 4].view(*w.q.shape[:2], 8, GROUP // 2)[group, :, :, lane // 2]  # [T, B, 8]
    return nibbles | _fifth(pairs >> (lane % 2 * 4).to(torch.uint8)[:, None, None])


def _join(chunks: Tensor, bits: int) -> Tensor:
    """Undo `split`, into fresh memory."""
    if bits == 8:
        return chunks.contiguous()
    nibbles = chunks[:, :, :4] & 15 | chunks[:, :, 4:] << 4  # [G, B, 4, R, I]
    if bits == 4:
        return nibbles.contiguous()
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=chunks.device)
    eights = (chunks >> 4).reshape(*chunks.shape[:2], 8, GROUP // 2, 8)  # of a pair of rows
    fifth = (eights * weights).sum(dim=-1, dtype=torch.uint8)  # [G, B, 8, R/2]
    return torch.cat((nibbles, fifth.view(*chunks.shape[:2], 1, GROUP, 4)), dim=2)


def _nibbles(packed: Tensor) -> Tensor:
    """Unpack the low four bits of chunks 0..7: [X, B, 4, ...] -> [X, B, 8, ...]."""
    return torch.cat((packed & 15, packed >> 4), dim=2)


def _fifth(fours: Tensor) -> Tensor:
    """Return 16 where a fifth bit is set, else 0: [...], bits 0..3 of each -> [..., 4]."""
    return (fours[..., None] << torch.arange(4, 0, -1, dtype=torch.uint8, device=fours.device)) & 16


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
