"""Matrices of weights, in floats or in blocks.

What: a layer multiplies by a `Weight`; `DenseWeight` keeps floats, `BlockWeight` keeps blocks of 32 inputs with a
float16 scale (`specdec.kernels` has all forms). `quantize` makes blocks, a few rows at a time, so that
a large matrix needs no float32 copy of itself; `specdec.weights.fit` has the arithmetic. Left out: blocks of 5 bits
from floats, which GGUF files have ready.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from specdec.kernels import BLOCK, GROUP, TABLES, BlockTensor, block_linear, block_rows, dense_linear, pack_blocks
from specdec.util.threads import keep_to_one_thread, one_torch_thread
from specdec.weights.fit import Natural, NaturalHalves, fit_int4, fit_int8
from specdec.weights.formats.lattice import fit_lattice, lattice_share

QuantizedStorage = Literal["int4", "int8"]
Storage = Literal["int4", "int8", "none"] | None
_CHUNK = 1 << 20  # weights handled at once: float32 temporaries of 4 MB each
# Share of a matrix's blocks that must lie on a lattice for it to be stored as one. The others have the error of plain 4
# bits, which 8 bits do not have.
_ON_LATTICE = {"int4": 0.9, "int8": 0.9999}


class Weight(Protocol):
    """Hold a matrix [N outputs, K inputs]; the caller never asks how it is stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K)."""

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory, padding and scales included."""

    @property
    def packed(self) -> BlockTensor | None:
        """Return the blocks, for kernels that take several matrices at once; None where the matrix is not in blocks."""

    def linear(self, x: Tensor) -> Tensor:
        """Return x [T, K] times the transpose of the matrix: [T, N] in x's dtype."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `ids` [T] (long) as `dtype` [T, K]: an embedding lookup."""

    def dequantize(self) -> Tensor:
        """Return the whole matrix as float32 [N, K]."""

    def to(self, device: torch.device | str) -> Weight:
        """Return the same weight on `device`."""


@dataclass(frozen=True)
class DenseWeight:
    """Hold a matrix of floats [N, K]."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K)."""
        return (self.tensor.shape[0], self.tensor.shape[1])

    @property
    def nbytes(self) -> int:
        """Return the bytes of the floats."""
        return self.tensor.nbytes

    @property
    def packed(self) -> None:
        """Return None: floats are no blocks."""
        return None

    def linear(self, x: Tensor) -> Tensor:
        """Return x [T, K] times the transpose of the matrix: [T, N] in x's dtype."""
        return dense_linear(x, self.tensor, None)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `ids` [T] as `dtype` [T, K]."""
        return self.tensor.index_select(0, ids).to(dtype)

    def dequantize(self) -> Tensor:
        """Return the matrix as float32, shared where it is float32 already."""
        return self.tensor.float()

    def to(self, device: torch.device | str) -> DenseWeight:
        """Return the weight on `device`."""
        return DenseWeight(self.tensor.to(device))


@dataclass(frozen=True)
class BlockWeight:
    """Hold a matrix in blocks of 32 inputs, of 2 to 8 bits (layout: `specdec.kernels`)."""

    blocks: BlockTensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K), without the padding of rows."""
        return (self.blocks.rows, self.blocks.columns)

    @property
    def nbytes(self) -> int:
        """Return the bytes of integers, scales and minimums, padding included."""
        return self.blocks.nbytes

    @property
    def packed(self) -> BlockTensor:
        """Return the blocks."""
        return self.blocks

    def linear(self, x: Tensor) -> Tensor:
        """Return x [T, K] times the transpose of the matrix: [T, N] in x's dtype."""
        return block_linear(x, self.blocks)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `ids` [T] as `dtype` [T, K], dequantised."""
        return block_rows(ids, self.blocks, dtype)

    def dequantize(self) -> Tensor:
        """Return the matrix as float32 [N, K], made a few rows at a time."""
        out = torch.empty(self.shape, dtype=torch.float32, device=self.blocks.device)
        for start, stop in chunks(*self.shape):
            ids = torch.arange(start, stop, dtype=torch.int64, device=self.blocks.device)
            out[start:stop] = block_rows(ids, self.blocks, torch.float32)
        return out

    def to(self, device: torch.device | str) -> BlockWeight:
        """Return the weight on `device`."""
        return BlockWeight(self.blocks.to(device))


def quantize(
    tensor: Tensor, storage: QuantizedStorage, *, name: str = "the tensor", rows: Tensor | None = None
) -> BlockWeight:
    """Quantise `tensor` [N, K], of any float dtype, to blocks of 4 or 8 bits; `rows` [M] picks rows in that order.

    int8: scale = max|w| / 127 in float16, so |error| <= scale / 2. int4: scale and minimum in float16 with the least
    squared error among a few ranges, each refitted by least squares; never worse, block by block, than Q4_1. Either
    way a matrix that was trained for 4 bits (`formats.lattice`) takes 4 bits without a minimum: nothing is closer.
    Raises ValueError, naming `name`, when K is not a multiple of 32 (keep such a matrix dense) and for values that are
    not finite or exceed float16 scales.
    """
    count, columns = (tensor.shape[0] if rows is None else rows.numel()), tensor.shape[1]
    if columns % BLOCK:
        raise ValueError(f"{name} has {columns} inputs, not a multiple of {BLOCK}; keep it dense (quantize='none')")
    fit = fit_int4 if storage == "int4" else fit_int8
    found: list[Tensor] = []

    def part(start: int, stop: int) -> Tensor:
        return (tensor[start:stop] if rows is None else tensor.index_select(0, rows[start:stop])).float()

    def recovered(start: int, stop: int) -> Natural:
        blocks, resolved = fit_lattice(part(start, stop))
        found.append(resolved.float().mean() * ((stop - start) / count))
        return blocks

    if is_on_lattice(tensor, storage):
        weight = pack(count, columns, 4, recovered, name)
        if sum(map(float, found)) >= _ON_LATTICE[storage]:
            return weight
    return pack(count, columns, 4 if storage == "int4" else 8, lambda i, j: fit(part(i, j)), name)


def is_on_lattice(tensor: Tensor, storage: QuantizedStorage) -> bool:
    """Return whether a few rows of `tensor` [N, K] are such that `quantize` may store 4 bits without a minimum."""
    return lattice_share(tensor) >= _ON_LATTICE[storage]


def stored_bytes(shape: tuple[int, ...], storage: Storage, dtype: torch.dtype) -> int:
    """Return the bytes of a tensor of floats of `shape` after `convert`; vectors stay in `dtype`."""
    if len(shape) < 2 or storage not in ("int4", "int8") or shape[-1] % BLOCK:
        return math.prod(shape) * dtype.itemsize
    return block_bytes(shape, 4, True) if storage == "int4" else block_bytes(shape, 8, False)


def block_bytes(shape: tuple[int, ...], bits: int, minimum: bool, sub: bool = False) -> int:
    """Return the bytes of a matrix in blocks, with a float16 scale for each, and perhaps a float16 minimum and a byte
    for each half (`sub`); of several matrices [..., N, K], one below the other."""
    groups, blocks = -(-math.prod(shape[:-1]) // GROUP), shape[-1] // BLOCK
    return groups * blocks * GROUP * (bits * BLOCK // 8 + 2 * (1 + minimum + sub))


def row_range(weight: Weight, start: int, stop: int) -> Weight:
    """Return rows `start` to `stop` of a matrix, in the memory of the whole; in blocks, rows of whole groups of 16."""
    if (blocks := weight.packed) is None:
        assert isinstance(weight, DenseWeight)
        return DenseWeight(weight.tensor[start:stop])
    assert start % GROUP == 0 and (stop % GROUP == 0 or stop == blocks.rows), f"rows {start} to {stop}"
    parts: dict[str, Any] = {
        field.name: part[start // GROUP : -(-stop // GROUP)]
        for field in fields(blocks)
        if isinstance(part := getattr(blocks, field.name), Tensor) and part.dim() > 1
    }
    return BlockWeight(replace(blocks, rows=stop - start, **parts))


def tensors_of(weight: Weight) -> list[Tensor]:
    """Return the tensors that hold a matrix."""
    if (blocks := weight.packed) is None:
        assert isinstance(weight, DenseWeight)
        return [weight.tensor]
    return [part for field in fields(blocks) if isinstance(part := getattr(blocks, field.name), Tensor)]


def convert(tensor: Tensor, dtype: torch.dtype, storage: Storage, *, name: str, rows: Tensor | None = None) -> Weight:
    """Convert a float matrix [N, K] to blocks where `storage` asks for them and K allows it, else to `dtype`.

    The result never shares memory with `tensor`, which may be a mapped file. Raises ValueError, naming `name`, for
    values that are not finite, or not in `dtype`.
    """
    if storage in ("int4", "int8") and tensor.shape[1] % BLOCK == 0:
        return quantize(tensor, storage, name=name, rows=rows)
    picked = tensor if rows is None else tensor.index_select(0, rows)
    return checked_dense(picked.to(dtype, copy=True), name)


def checked_dense(tensor: Tensor, name: str) -> DenseWeight:
    """Return `tensor` [N, K] as a weight. Raises ValueError, naming `name`, when a value is not finite."""
    low, high = torch.aminmax(tensor)  # NaN and infinity show in either, and no mask is allocated
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError(
            f"{name} holds values that are not finite in {tensor.dtype}; use dtype=torch.bfloat16 or "
            "torch.float32, and fetch the checkpoint again if that does not help"
        )
    return DenseWeight(tensor)


def table_weight(codes: Tensor, scale: Tensor, table: str, name: str = "the tensor") -> BlockWeight:
    """Return the matrix whose weights are `scale` [N, K/32] times the numbers that `codes` [N, K] (0..15) name.

    `table`: a name of `specdec.kernels.TABLES`. Numbers are those of the format: of "fp4" 0, 0.5 .. 6 and negatives
    (e2m1); of "nf4" -1 .. 1, within 0.004; of "iq4" -127 .. 113. Raises ValueError, naming `name`, for a scale that is
    not finite or too large.
    """

    def read(start: int, stop: int) -> Natural:
        return codes[start:stop], table_scale(scale[start:stop].float(), table), None

    return pack(codes.shape[0], codes.shape[1], 4, read, name, table)


def table_scale(scale: Tensor, table: str) -> Tensor:
    """Return what is stored for scale [...] of the format's own numbers, for blocks multiply the whole numbers of
    `table`, and by its unit."""
    return scale / (TABLES[table].one * TABLES[table].unit)


def pack(
    count: int,
    columns: int,
    bits: int,
    read: Callable[[int, int], NaturalHalves],
    name: str,
    table: str | None = None,
) -> BlockWeight:
    """Pack a [count, columns] matrix into blocks; `read(start, stop)` gives those rows in plain order.

    `table`: what the codes mean, a name of `specdec.kernels.TABLES`. Only
    a chunk for every thread exists twice. Raises ValueError, naming `name`, when a scale or minimum is not finite.
    """

    def made(start: int, stop: int) -> BlockTensor:
        values, scale, minimum, *sub = read(start, stop)
        scale, minimum = scale.half(), None if minimum is None else minimum.half()  # infinite where they do not fit
        if not all(bool(torch.isfinite(t).all()) for t in (scale, minimum) if t is not None):
            raise ValueError(
                f"{name} holds values that are not finite, or too large for float16 block scales; fetch the "
                "checkpoint again, or load it with quantize='none' and dtype=torch.float32"
            )
        return pack_blocks(values, scale, minimum, bits, table=table, sub=sub[0] if sub else None)

    def place(start: int, part: BlockTensor) -> None:
        first = start // GROUP
        for whole, its in zip(_parts(target), _parts(part), strict=True):
            if whole is not None and its is not None:
                whole[first : first + len(its)] = its

    first, *others = chunks(count, columns)
    if not others:
        with one_torch_thread():
            return BlockWeight(made(*first))
    # A thread of its own for each chunk: torch's threads meet after every op, and wait there for the slower one.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=keep_to_one_thread) as pool:
        part = pool.submit(made, *first).result()
        target = _empty(part, count)
        place(0, part)
        for _ in pool.map(lambda span: place(span[0], made(*span)), others):
            pass
    return BlockWeight(target)


def chunks(count: int, columns: int) -> list[tuple[int, int]]:
    """Return ranges (start, stop) that cover `count` rows of `columns`; all but the last are whole groups of 16."""
    step = max(_CHUNK // columns // GROUP, 1) * GROUP
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _empty(part: BlockTensor, count: int) -> BlockTensor:
    groups = -(-count // GROUP)

    def like(tensor: Tensor) -> Tensor:
        return tensor.new_empty((groups, *tensor.shape[1:]))

    q, scale, minimum, sub = (None if tensor is None else like(tensor) for tensor in _parts(part))
    assert q is not None and scale is not None
    return BlockTensor(q, scale, minimum, part.bits, count, part.columns, part.table, sub)


def _parts(blocks: BlockTensor) -> tuple[Tensor | None, ...]:
    return blocks.q, blocks.scale, blocks.minimum, blocks.sub
