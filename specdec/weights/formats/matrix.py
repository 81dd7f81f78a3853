"""A matrix that another program quantised, and what it becomes here.

What: `PackedMatrix` knows which tensors of the files hold a matrix; `weight` makes blocks of them a few rows at a time,
so that no copy of the matrix in floats is ever in memory. Integers stay the integers that they are where our blocks
have room for them: 4 and 8 bits, and up to 5 bits with an offset; codes of sixteen numbers stay codes where one of our
tables has these numbers. Others are expanded and fitted to 8 bits. Why groups of 64 and more cost nothing: our blocks
of 32 repeat the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels import BLOCK, HALF, TABLES, BlockForm
from specdec.weights.fit import NaturalHalves, fit_int8, split_halves
from specdec.weights.metadata import quote
from specdec.weights.tensors import (
    BlockWeight,
    Storage,
    Weight,
    block_bytes,
    checked_dense,
    chunks,
    pack,
    stored_bytes,
    table_scale,
)

FLOATS = ("F32", "F16", "BF16")  # types of scales, in the words of safetensors
_NEAR = 0.006  # of a table's largest number: NF4's are within 0.004, bitsandbytes' FP4 within 0.0053
Rows = slice | Tensor
"""Consecutive rows, the first a multiple of 16; or ids of rows, long [R]."""
Parts = Mapping[str, Tensor]
"""The tensors that a matrix is made of, by the last part of their names."""


class Stored(NamedTuple):
    """Hold a tensor of a file as its header has it; `dtype` in the words of safetensors."""

    shape: tuple[int, ...]
    dtype: str


class Codes(NamedTuple):
    """Hold rows as integers: weight = values * scale + offset; without an offset (values - middle) * scale, where the
    middle is half of the range; with numbers, numbers[values] * scale * whole. values uint8 [R, K]; scale and offset
    float32 [R, groups]; numbers float32 [16]; whole: the scale of the whole matrix."""

    values: Tensor
    scale: Tensor
    offset: Tensor | None
    numbers: Tensor | None = None
    whole: float = 1.0


class TableCodes(NamedTuple):
    """Hold what a format's codes are among ours. `table`: a name of `specdec.kernels.TABLES`; `places` uint8 [16]: the
    code in that table of each of the format's; `one`: what the format calls 1, in the table's own numbers; `exact`: the
    table has the format's very numbers."""

    table: str
    places: Tensor
    one: float
    exact: bool


@dataclass(frozen=True)
class PackedMatrix:
    """Hold a quantised matrix of a checkpoint.

    `format`: for people. `parts`: names in the files by the last part of the name. `bits`: of the integers that `read`
    returns, None where it returns floats [R, K]. `group`: inputs that share a scale. `rounds`: offsets are products,
    which float16 rounds. `codes`: what codes that name sixteen numbers are among ours; None where values are numbers.
    """

    format: str
    shape: tuple[int, int]
    parts: Mapping[str, str]
    read: Callable[[Parts, Rows], Codes | Tensor]
    bits: int | None = None
    group: int = BLOCK
    offset: bool = False
    rounds: bool = False
    codes: TableCodes | None = None

    @property
    def is_refitted(self) -> bool:
        """Tell whether the integers have no place in our blocks, so that the matrix is quantised again."""
        if self.bits is None:
            return True
        if self.codes is not None:
            return self.group % BLOCK > 0 and not (self.group == HALF and self.codes.exact)
        return self.bits not in ((2, 3, 4, 5) if self.offset else (4, 8)) or self.group % BLOCK > 0

    @property
    def is_changed(self) -> bool:
        """Tell whether the weights are others than the format's by more than the rounding of a product."""
        return self.is_refitted or (self.codes is not None and (self.group == HALF or not self.codes.exact))

    @property
    def form(self) -> BlockForm:
        """Return the form of our blocks."""
        if self.is_refitted or self.bits is None:
            return BlockForm(8)
        if self.codes is not None:
            return BlockForm(4, table=True, sub=self.group == HALF)
        return BlockForm(max(self.bits, 4), self.offset)

    @property
    def becomes(self) -> str:
        """Say what the matrix is in memory, and how exact."""
        form = self.form
        what = (
            f"{form.bits} bits{', with a minimum' if form.minimum else ''}{', codes of a table' if form.table else ''}"
        )
        halves = ", 16 inputs to a scale" if form.sub else ""
        if self.codes is not None and self.is_changed and not self.is_refitted:
            how = "scales rounded" if self.codes.exact else "numbers rounded"
        else:
            how = "quantised again" if self.is_refitted else "minimum rounded" if self.rounds else "exact"
        return f"{what}{halves}; {how}"

    def loaded_bytes(self, dtype: torch.dtype, quantize: Storage) -> int:
        """Return the bytes in memory of what `weight` makes."""
        if quantize == "none" or self.shape[1] % BLOCK:
            return stored_bytes(self.shape, "none", dtype)
        return block_bytes(self.shape, self.form.bits, self.form.minimum, self.form.sub)

    def weight(self, parts: Parts, dtype: torch.dtype, quantize: Storage, rows: Tensor | None, label: str) -> Weight:
        """Return the matrix in blocks; in `dtype` where `quantize` is "none", or where K is no multiple of 32.

        `rows` [M] long picks rows. Raises ValueError, naming `label`, for values that are not finite.
        """
        count, columns = (self.shape[0] if rows is None else rows.numel()), self.shape[1]

        def picked(start: int, stop: int) -> Rows:
            return slice(start, stop) if rows is None else rows[start:stop]

        if quantize == "none" or columns % BLOCK:
            dense = torch.empty(count, columns, dtype=dtype)
            for start, stop in chunks(count, columns):
                dense[start:stop] = self.floats(parts, picked(start, stop))
            return checked_dense(dense, label)
        return self._packed(parts, picked, count, label)

    def _packed(self, parts: Parts, picked: Callable[[int, int], Rows], count: int, label: str) -> BlockWeight:
        table = None if self.codes is None or self.is_refitted else self.codes

        def read(start: int, stop: int) -> NaturalHalves:
            if self.is_refitted:
                return fit_int8(self.floats(parts, picked(start, stop)))
            codes = self.read(parts, picked(start, stop))
            assert isinstance(codes, Codes)
            return _natural(codes, self.form.bits) if table is None else _of_table(codes, table)

        return pack(count, self.shape[1], self.form.bits, read, label, None if table is None else table.table)

    def floats(self, parts: Parts, rows: Rows) -> Tensor:
        """Return rows as float32 [R, K], by the format's own formula."""
        found = self.read(parts, rows)
        if isinstance(found, Tensor):
            return found
        count, columns = found.values.shape
        if found.numbers is not None:
            numbers = found.numbers.index_select(0, found.values.flatten().int()).view(*found.scale.shape, -1)
            return (numbers * (found.scale * found.whole)[..., None]).view(count, columns)
        groups = found.values.view(count, found.scale.shape[1], -1).float()
        if found.offset is None:
            assert self.bits is not None
            groups = groups - (1 << (self.bits - 1))
            return (groups * found.scale[..., None]).view(count, columns)
        return (groups * found.scale[..., None] + found.offset[..., None]).view(count, columns)


def table_of(numbers: Tensor) -> TableCodes | None:
    """Return what codes of these numbers, float32 [16] of which the largest is 1, are among ours; None where no table
    is near."""
    for table in ("fp4", "nf4"):
        ours = TABLES[table].numbers.float()
        top = float(ours.max())
        apart = (numbers[:, None] - ours / top).abs()
        nearest, places = apart.min(1)
        if float(nearest.max()) < _NEAR:
            return TableCodes(table, places.to(torch.uint8), top / TABLES[table].one, not bool(nearest.any()))
    return None


def _of_table(codes: Codes, ours: TableCodes) -> NaturalHalves:
    values = codes.values
    if not torch.equal(ours.places, torch.arange(16, dtype=torch.uint8)):
        values = ours.places.index_select(0, values.flatten().int()).view(values.shape)
    blocks = values.shape[1] // BLOCK
    if codes.scale.shape[1] > blocks:
        step, factors = split_halves(codes.scale)
        return values, table_scale(step * codes.whole / ours.one, ours.table), None, factors
    scale = table_scale(codes.scale * codes.whole / ours.one, ours.table)
    return values, scale.repeat_interleave(blocks // scale.shape[1], 1), None


def _natural(codes: Codes, bits: int) -> NaturalHalves:
    repeat = codes.values.shape[1] // BLOCK // codes.scale.shape[1]
    scale = codes.scale.half().repeat_interleave(repeat, 1)
    if bits == 8:
        return (codes.values ^ 0x80).view(torch.int8), scale, None
    return codes.values, scale, None if codes.offset is None else codes.offset.half().repeat_interleave(repeat, 1)


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """Unpack a stream of bits, low ones first, along rows of int32 words [R, W]: uint8 [R, 32 * W / bits]."""
    raw = words.contiguous().view(torch.uint8)  # [R, 4W], little endian
    if bits == 8:
        return raw
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (raw[..., None] >> shifts & (1 << bits) - 1).flatten(1)
    eights = raw.view(len(raw), -1, bits).to(torch.int16)  # `bits` bytes hold eight values
    eights = torch.nn.functional.pad(eights, (0, 1))
    first = torch.arange(0, 8 * bits, bits, dtype=torch.int64)
    pairs = eights[..., first // 8] | eights[..., first // 8 + 1] << 8  # [R, X, 8]
    return (pairs >> (first % 8).to(torch.int16) & (1 << bits) - 1).to(torch.uint8).flatten(1)


def unpack_rows(words: Tensor, rows: Rows, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unpack rows of int32 words [W, X], each of which holds 32 / bits rows: uint8 [R, X].

    `order`: the place in a word of each of its rows, counted from the lowest bits; None: one after the other.
    """
    per = 32 // bits
    places = torch.tensor(range(per) if order is None else order, dtype=torch.int64) * bits
    if isinstance(rows, slice):
        first, last = rows.start // per, -(-rows.stop // per)
        part = words[first:last].contiguous()  # [P, X]
        shifts = places.to(torch.int32)[:, None]
        values = (part[:, None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(0, 1)
        return values[rows.start - first * per : rows.stop - first * per]
    shifts = places[rows % per].to(torch.int32)[:, None]
    return (words.index_select(0, rows // per) >> shifts & (1 << bits) - 1).to(torch.uint8)


def is_matrix(stored: Stored | None, dtypes: tuple[str, ...], rows: int | None = None) -> bool:
    """Tell whether a tensor is there, has two dimensions, and one of `dtypes`; and so many rows."""
    return (
        stored is not None
        and len(stored.shape) == 2
        and 0 not in stored.shape
        and stored.dtype in dtypes
        and rows in (None, stored.shape[0])
    )


def misfit(format: str, name: str, stored: Mapping[str, Stored], parts: Mapping[str, str]) -> ValueError:
    """Return the error for a matrix whose parts do not fit each other, or the config."""
    if any(full in stored and len(stored[full].shape) == 3 for full in parts.values()):
        return ValueError(
            f"{quote(name)} has three dimensions: experts of a mixture, which are not read as {format}; name a GGUF "
            "file of this model"
        )
    told = ", ".join(
        f"{part} {stored[full].dtype} {list(stored[full].shape)}" if full in stored else f"no {part}"
        for part, full in parts.items()
    )
    return ValueError(
        f"{quote(name)} is no matrix of {format} ({told}): files and config are damaged, or not of the same model; "
        "fetch both again"
    )
