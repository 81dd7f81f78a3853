"""Block-quantised weights in the one layout that torch and C++ share.

A weight matrix [N, K] is cut into blocks of 32 columns; a block has codes of 2 to 8 bits, a float16 scale and, perhaps,
a float16 minimum. Sixteen rows are interleaved four columns at a time: 64 weights of a byte each (a chunk) are what one
512-bit dot-product instruction (VNNI `vpdpbusd`: 16 lanes of 4 bytes) eats. Chunk c of a block's eight is columns
32b+4c+i, i = 0..3, of all sixteen rows. The codes of a block are `bits` lines of 64 bytes, q uint8 [N/16, K/32, bits,
16, 4], of three kinds, the low bits of a code first:

    nibbles  4 lines  byte (j, r, i) is row 16g+r; low nibble column 32b+4j+i, high nibble column 32b+16+4j+i
    twos     2 lines  byte (h, r, i) is row 16g+r; its bits 2k and 2k+1 are of column 32b+16h+4k+i, k = 0..3
    ones     1 line   bit 4r+i of the eight bytes (little endian) at 8c is row 16g+r, column 32b+4c+i

    2 bits: twos. 3 bits: twos, ones. 4 bits: nibbles. 5 bits: nibbles, ones. 6 bits: nibbles, twos.
    8 bits: q [N/16, K/32, 8, 16, 4], byte (j, r, i) = value + 128, row 16g+r, column 32b+4j+i

    scale, minimum  float16 [N/16, K/32, 16]
    sub             uint8 [N/16, K/32, 16, 2], for the first and the last 16 columns of a block: with a minimum the
                    factors of scale (low nibble) and of minimum (high nibble), else the factor of scale (int8)

    weight = value * scale, or code * scale + minimum; scale and minimum times their factor of `sub` where it is there,
             scale times the unit of the table
    value  = the number of `TABLES` at the place that the code names (with a table), code - zero (without; 2^(bits - 1))

Why ones lie like this: eight bytes are a chunk's 64-bit mask for AVX-512. N is padded to a multiple of 16 with rows of
scale zero. `forms.py` has the forms and the tables that there are. Left out: other block sizes; GGUF formats that need
them are converted by the reader in `specdec/weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.forms import BLOCK, GROUP, HALF, TABLES, VALUES, BlockForm, check_form, table_numbers


@dataclass(frozen=True)
class BlockTensor:
    """Hold a quantised [rows, columns] matrix; the fields have the layout in the module docstring. `table`: a name of
    `TABLES`."""

    q: Tensor
    scale: Tensor
    minimum: Tensor | None
    bits: int
    rows: int
    columns: int
    table: str | None = None
    sub: Tensor | None = None

    def __post_init__(self) -> None:
        check_form(self.form, self.table)
        if self.columns % BLOCK or self.columns <= 0 or self.rows <= 0:
            raise ValueError(
                f"a block tensor has rows, and columns in multiples of {BLOCK}; got {self.rows} x {self.columns}"
            )
        groups, blocks = -(-self.rows // GROUP), self.columns // BLOCK
        self._check("q", self.q, (groups, blocks, self.bits, GROUP, 4), torch.uint8)
        for name, part in (("scale", self.scale), ("minimum", self.minimum)):
            if part is not None:
                self._check(name, part, (groups, blocks, GROUP), torch.float16)
        if self.sub is not None:
            self._check("sub", self.sub, (groups, blocks, GROUP, 2), torch.uint8)

    def _check(self, name: str, part: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if tuple(part.shape) != shape or part.dtype != dtype or not part.is_contiguous():
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be contiguous {kind} {shape}, got {part.dtype} {tuple(part.shape)}")
        if part.device != self.q.device:
            raise ValueError(f"{name} must be on the device of q ({self.q.device})")

    @property
    def form(self) -> BlockForm:
        """Return how the weights are stored."""
        return BlockForm(self.bits, self.minimum is not None, self.table is not None, self.sub is not None)

    @property
    def nbytes(self) -> int:
        """Count the bytes of the tensors together."""
        return sum(part.nbytes for part in (self.q, self.scale, self.minimum, self.sub) if part is not None)

    @property
    def zero(self) -> int:
        """Return the code that means a weight of zero where there is neither minimum nor table."""
        return 1 << (self.bits - 1)

    @property
    def unit(self) -> float:
        """Return the power of two by which scales are multiplied."""
        return 1.0 if self.table is None else TABLES[self.table].unit

    @property
    def device(self) -> torch.device:
        """Return the device of the tensors."""
        return self.q.device

    def to(self, device: torch.device | str) -> BlockTensor:
        """Return the same matrix on `device`."""
        return self.move(lambda part: part.to(device))

    def move(self, move: Callable[[Tensor], Tensor]) -> BlockTensor:
        """Return the same matrix, each tensor where `move` puts it."""
        minimum, sub = (None if part is None else move(part) for part in (self.minimum, self.sub))
        return BlockTensor(move(self.q), move(self.scale), minimum, self.bits, self.rows, self.columns, self.table, sub)


def pack_blocks(
    values: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bits: int,
    *,
    table: str | None = None,
    sub: Tensor | None = None,
) -> BlockTensor:
    """Interleave a quantised matrix.

    values [N, K]: integers 0..2^bits - 1, or -128..127 (8 bits); scale and minimum [N, K/32], any float dtype, rounded
    to float16; `table`: a name of `TABLES`; `sub` [N, K/16]: int8, or uint8 with a minimum (see the module docstring).
    Raises ValueError for a shape or value that the layout cannot hold.
    """
    check_form(BlockForm(bits, minimum is not None, table is not None, sub is not None), table)
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
        table,
        None if sub is None else _pack_sub(sub, rows, blocks, minimum is not None),
    )


def unpack_blocks(w: BlockTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `pack_blocks`: values [N, K] (uint8, or int8 for 8 bits), scale and minimum float16 [N, K/32]."""
    raw = split(w.q, w.bits).permute(0, 3, 1, 2, 4)  # [G, R, B, 8, I]
    values = raw.reshape(-1, w.columns)[: w.rows]  # [N, K]
    if VALUES[w.bits][0] < 0:
        values = (values ^ 0x80).view(torch.int8)
    minimum = None if w.minimum is None else _unpack_scale(w.minimum, w.rows)
    return values.contiguous(), _unpack_scale(w.scale, w.rows), minimum


def unpack_sub(w: BlockTensor) -> Tensor | None:
    """Return `sub` [N, K/16] as `pack_blocks` took it; None where there is none."""
    if w.sub is None:
        return None
    plain = w.sub.transpose(1, 2).reshape(-1, w.columns // HALF)[: w.rows].contiguous()  # [N, K/16]
    return plain if w.minimum is not None else plain.view(torch.int8)


def split(q: Tensor, bits: int) -> Tensor:
    """Unpack the codes of some groups, chunk by chunk: q [G, B, bits, R, I] -> uint8 [G, B, 8, R, I]."""
    if bits % 2 == 0:
        return _even_bits(q, bits)
    pairs = q[:, :, -1].view(*q.shape[:2], 8, GROUP // 2, 1)  # a byte has four bits of each of two rows
    fours = torch.cat((pairs & 15, pairs >> 4), dim=-1).flatten(3)  # [G, B, 8, R]
    return _even_bits(q, bits - 1) | _ones(fours) << (bits - 1)


def split_rows(w: BlockTensor, ids: Tensor) -> Tensor:
    """Unpack the codes of rows `ids` [T], chunk by chunk: uint8 [T, B, 8, I]."""
    group, lane = ids // GROUP, ids % GROUP
    raw = w.q[group, :, :, lane]  # [T, B, bits, I]
    if w.bits % 2 == 0:
        return _even_bits(raw, w.bits)
    pairs = w.q[:, :, -1].view(*w.q.shape[:2], 8, GROUP // 2)[group, :, :, lane // 2]  # [T, B, 8]
    return _even_bits(raw, w.bits - 1) | _ones(pairs >> (lane % 2 * 4).to(torch.uint8)[:, None, None]) << (w.bits - 1)


def values_of(codes: Tensor, w: BlockTensor) -> Tensor:
    """Return the integers that `codes` [...] of `w` mean, before scales and minimums: float32 [...]."""
    if w.table is not None:
        return table_numbers(w.table, codes.device)[codes.long()].float()
    return codes.float() - (0.0 if w.minimum is not None else float(w.zero))


def factors(w: BlockTensor, sub: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of scale and of minimum in `sub` [...], some of `w.sub`, as float32 [...] each."""
    if w.minimum is not None:
        return (sub & 15).float(), (sub >> 4).float()
    return sub.view(torch.int8).float(), torch.zeros_like(sub, dtype=torch.float32)


def _join(chunks: Tensor, bits: int) -> Tensor:
    """Undo `split`, into fresh memory."""
    if bits == 8:
        return chunks.contiguous()
    lines, shift = [], 0
    if bits >= 4:
        lines.append(chunks[:, :, :4] & 15 | chunks[:, :, 4:] << 4)  # [G, B, 4, R, I]
        shift = 4
    if bits in (2, 3, 6):
        twos = (chunks >> shift & 3).reshape(*chunks.shape[:2], 2, 4, GROUP, 4)  # [G, B, 2, 4, R, I]
        twos = twos << 2 * _counted(4, chunks)[:, None, None]
        lines.append(twos.sum(dim=3, dtype=torch.uint8))  # [G, B, 2, R, I]
        shift += 2
    if bits % 2:
        eights = (chunks >> shift).reshape(*chunks.shape[:2], 8, GROUP // 2, 8)  # [G, B, 8, R/2, two rows' I]
        ones = (eights << _counted(8, chunks)).sum(dim=-1, dtype=torch.uint8)  # [G, B, 8, R/2]
        lines.append(ones.view(*chunks.shape[:2], 1, GROUP, 4))  # [G, B, 1, R, I]
    return lines[0].contiguous() if len(lines) == 1 else torch.cat(lines, dim=2)


def _even_bits(lines: Tensor, bits: int) -> Tensor:
    """Unpack nibbles and twos, or bytes, of chunks 0..7: [X, B, bits or more, ...] -> [X, B, 8, ...]."""
    if bits == 8:
        return lines
    if bits == 2:
        shifts = (2 * _counted(4, lines)).view(4, *[1] * (lines.dim() - 3))
        return (lines[:, :, :2, None] >> shifts & 3).flatten(2, 3)
    nibbles = torch.cat((lines[:, :, :4] & 15, lines[:, :, :4] >> 4), dim=2)
    return nibbles if bits == 4 else nibbles | _even_bits(lines[:, :, 4:], 2) << 4


def _ones(fours: Tensor) -> Tensor:
    """Unpack bits 0..3: [...] -> [..., 4]."""
    return fours[..., None] >> _counted(4, fours) & 1


def _counted(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


def _pack_scale(part: Tensor, name: str, rows: int, blocks: int) -> Tensor:
    if tuple(part.shape) != (rows, blocks):
        raise ValueError(f"{name} must be [N, K/32] = {(rows, blocks)}, got {tuple(part.shape)}")
    half = part.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{name} does not fit float16 (at most 65504, no NaN); rescale the tensor")
    half = torch.nn.functional.pad(half, (0, 0, 0, -rows % GROUP))
    return half.view(-1, GROUP, blocks).transpose(1, 2).contiguous()  # [G, B, R]


def _pack_sub(sub: Tensor, rows: int, blocks: int, minimum: bool) -> Tensor:
    wanted = torch.uint8 if minimum else torch.int8
    if tuple(sub.shape) != (rows, 2 * blocks) or sub.dtype != wanted:
        raise ValueError(f"sub must be {wanted} [N, K/16] = {(rows, 2 * blocks)}, got {sub.dtype} {tuple(sub.shape)}")
    raw = torch.nn.functional.pad(sub.contiguous().view(torch.uint8), (0, 0, 0, -rows % GROUP))
    return raw.view(-1, GROUP, blocks, 2).transpose(1, 2).contiguous()  # [G, B, R, 2]


def _unpack_scale(part: Tensor, rows: int) -> Tensor:
    return part.transpose(1, 2).reshape(-1, part.shape[1])[:rows].contiguous()  # [N, B]
