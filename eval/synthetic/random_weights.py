"""Quantised weights of any size from random numbers, packed at once: for speed, memory and nothing else.

What: `random_blocks`, one matrix; `RandomCheckpoint`, every tensor of a `DecoderSpec`, in the storage that
`quantize="int4"` would give a float checkpoint. Why packed: 12 billion weights as floats would need 48 GB, and packing
them block by block minutes. A few hundred rows are packed and repeated down the matrix, in memory of their own each; no
kernel's speed depends on the values. Left out: text that means anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import BLOCK, GROUP, HALF, TABLES, BlockTensor, pack_blocks
from specdec.model.names import expected_tensors
from specdec.model.spec import DecoderSpec
from specdec.weights.checkpoint import find
from specdec.weights.tensors import BlockWeight, DenseWeight, Storage, Weight, stored_bytes

PATTERN = 256  # rows that are packed; a multiple of the 16 that the layout interleaves
PRIME = 509  # rows that are drawn for a checkpoint; a prime, so that blocks of rows do not repeat


def random_blocks(
    rows: int,
    columns: int,
    bits: int,
    minimum: bool = False,
    seed: int = 0,
    table: str | None = None,
    sub: bool = False,
) -> BlockTensor:
    """Return a random [rows, columns] matrix whose products are about as large as their inputs.

    Mean about 0, variance about 1 / columns. The matrix repeats itself every 256 rows. `table`, `sub`: see
    `specdec.kernels.pack_blocks`. Raises ValueError for a form or columns that the layout does not have.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (-127, 128) if bits == 8 else (0, 1 << bits)
    kind = torch.int8 if bits == 8 else torch.uint8
    count = min(PATTERN, -(-rows // GROUP) * GROUP)
    values = torch.randint(low, high, (count, columns), dtype=kind, generator=generator)
    spread = math.sqrt(((high - low) ** 2 - 1) / 12)  # the standard deviation of whole numbers low .. high - 1
    if table is not None:
        spread = float(TABLES[table].numbers[:high].float().std()) * TABLES[table].unit
    scale = torch.full((count, columns // BLOCK), 1 / (spread * math.sqrt(columns)), dtype=torch.float32)
    scale = scale * (0.5 + torch.rand(scale.shape, generator=generator, dtype=torch.float32))
    factors = None
    if sub:
        factors = torch.full((count, columns // HALF), 0x88 if minimum else 127, dtype=torch.uint8)
        scale = scale / (8 if minimum else 127)
        factors = factors if minimum else factors.view(torch.int8)
    low_end = -(high - 1) / 2 * scale if minimum else None
    part = pack_blocks(values, scale, low_end, bits, table=table, sub=factors)
    groups = -(-rows // GROUP)
    whole: dict[str, Any] = {name: _repeated(tensor, groups) for name, tensor in _tensors(part).items()}
    return replace(part, rows=rows, **whole)


def random_tensor(name: str, shape: tuple[int, ...], norm_offset: float = 0.0) -> Tensor:
    """Return a random bfloat16 tensor: a matrix whose products are about as large as its inputs, or a norm or scalar
    that leaves sizes as they are. `norm_offset`: what the family adds to a norm's weight."""
    if len(shape) == 3:
        return random_tensor(name, (math.prod(shape[:2]), shape[2])).view(shape)
    if len(shape) != 2:
        return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0 - norm_offset, dtype=torch.bfloat16)
    pattern, scale = random_rows(name, *shape)
    out = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, shape[0], PRIME):
        part = scale[start : start + PRIME]
        out[start : start + PRIME] = pattern[: len(part)] * part
    return out


def random_rows(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return what a random matrix [rows, columns] is made of: PRIME rows or fewer [n, columns], which repeat, and a
    scale for each of its rows [rows, 1]; both float32."""
    seed = sum(name.rpartition("model.")[2].encode())  # of the canonical name: every format holds the same numbers
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randn(min(rows, PRIME), columns, generator=generator, dtype=torch.float32) / math.sqrt(columns)
    return pattern, 0.5 + torch.rand(rows, 1, generator=generator, dtype=torch.float32)


def copies(w: BlockTensor, total: int) -> list[BlockTensor]:
    """Return `w` and clones of it, two matrices at the least, of `total` bytes together or a little more."""
    count = max(2, -(-total // w.nbytes))
    return [w, *(_copy(w) for _ in range(count - 1))]


class RandomCheckpoint:
    """Make a `Checkpoint` with every tensor that `spec` needs, by its canonical name.

    Matrices are blocks of 4 bits with a minimum, and of 8 bits for `quantize="int8"`; the builder asks for the 8 bits
    of a 4-bit model's vocabulary. Norms and scalars are one, biases zero.
    """

    def __init__(self, spec: DecoderSpec, owner: str, more: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Make the tensors of `spec` known, and those of the shapes `more`; each is made when asked for. `owner` names
        them in errors."""
        self.path = Path(owner)
        self._shapes = {**expected_tensors(spec), **(more or {})}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape."""
        return dict(self._shapes)

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes of a tensor as `weight` makes it."""
        return stored_bytes(find(name, self._shapes, self.path), quantize, dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a vector of ones, or of zeros for a bias, float32."""
        shape = find(name, self._shapes, self.path)
        return (
            torch.zeros(shape, dtype=torch.float32)
            if name.endswith(".bias")
            else torch.ones(shape, dtype=torch.float32)
        )

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return a random matrix of 4-bit blocks with minimum, or of 8-bit ones; floats where K is no multiple of
        32."""
        assert quantize in ("int4", "int8") and rows is None, "random weights are made quantised"
        *stacked, columns = find(name, self._shapes, self.path)  # matrices of experts lie one below the other
        count = math.prod(stacked)
        seed = sum(name.encode())
        if columns % BLOCK:
            generator = torch.Generator().manual_seed(seed)
            return DenseWeight(
                (torch.randn(count, columns, generator=generator, dtype=torch.float32) / math.sqrt(columns)).to(dtype)
            )
        four = quantize == "int4"
        return BlockWeight(random_blocks(count, columns, 4 if four else 8, minimum=four, seed=seed))


def _copy(w: BlockTensor) -> BlockTensor:
    cloned: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(w).items()}
    return replace(w, **cloned)


def _tensors(w: BlockTensor) -> dict[str, Tensor]:
    parts = {field.name: getattr(w, field.name) for field in fields(w)}
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def _repeated(part: Tensor, groups: int) -> Tensor:
    """Repeat `part` [g, ...] down its first dimension: [groups, ...]."""
    assert 0 < part.shape[0] <= groups, "the layout is group by group"
    out = part.new_empty((groups, *part.shape[1:]))
    for start in range(0, groups, part.shape[0]):
        stop = min(start + part.shape[0], groups)
        out[start:stop] = part[: stop - start]
    return out
