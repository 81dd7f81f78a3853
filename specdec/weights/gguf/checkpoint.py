"""GGUF files as a checkpoint: llama.cpp's blocks become ours, without a detour through floats where they fit.

What: `GGUFCheckpoint` reads the tensors of a file, or of all parts of a split one.

| type | becomes | exact? |
|---|---|---|
| Q4_0, Q4_1 | 4 bits, without and with minimum | yes |
| Q5_0, Q5_1 | 5 bits, without and with minimum | yes |
| Q8_0 | 8 bits | yes |
| TQ1_0, TQ2_0 | 4 bits | yes |
| IQ4_NL | 4 bits and a table | yes |
| MXFP4 | 4 bits and a table | yes, for scales from 2^-31 to 2^8 |
| Q2_K; Q3_K; Q6_K | 2 bits with minimum; 3; 6 bits; a factor of the scale for each 16 inputs | yes |
| IQ2_XXS, IQ2_XS, IQ2_S, IQ1_S, IQ1_M | 3 bits and a table; a factor for each 16 inputs | yes |
| Q4_K, Q5_K | 4 and 5 bits with minimum | their products `d * scale` and `dmin * min` are rounded to float16 |
| IQ4_XS, IQ3_S, IQ3_XXS | 4 bits and a table | the scale is rounded to float16 |
| NVFP4 | 4 bits and a table; a factor for each 16 inputs | of two scales the smaller one, to 1/64 of the larger |

A type is looked at where its tensor is asked for: a file may hold others in tensors that nobody needs. Why each access
maps its tensor anew: the mapping ends with the call, so the resident memory of a load never holds more of the file than
one tensor. NVFP4 has a scale of the whole tensor in a tensor of its own, "X.scale" beside "X.weight".
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from specdec.util.threads import one_torch_thread
from specdec.weights.checkpoint import StoredRows, check_request, checked_floats, exact_floats, find
from specdec.weights.fit import NaturalHalves
from specdec.weights.gguf.blocks import BLOCKS, FLOATS, INTEGERS, USUAL, Bytes, expand
from specdec.weights.gguf.header import GGUFHeader, TensorInfo
from specdec.weights.gguf.split import read_parts
from specdec.weights.metadata import one_line
from specdec.weights.tensors import (
    BlockWeight,
    Storage,
    Weight,
    block_bytes,
    checked_dense,
    chunks,
    convert,
    pack,
    stored_bytes,
)

_MEASURED = 256  # rows on which the error of rounding is measured


class GGUFCheckpoint:
    """The tensors of a GGUF file, with all parts of a split one (see `specdec.weights.checkpoint.Checkpoint` for the
    methods).

    Raises ValueError when a part is missing or damaged (`gguf.header.read_header`); a method does when a tensor is
    stored in a type that is not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.header: GGUFHeader = read_parts(path)
        self._told = set[int]()

    @property
    def path(self) -> Path:
        """Return the file."""
        return self.header.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape in torch's order; scales of NVFP4 are part of what they scale."""
        return {name: info.shape for name, info in self.header.tensors.items() if not self._is_scale(name)}

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32, dequantised by the `gguf` package. Raises ValueError for integers that
        float32 cannot hold."""
        info = find(name, self.header.tensors, self.path)
        label = f"{info.file}: tensor {name!r}"
        if (whole := INTEGERS.get(info.type)) is not None:
            return exact_floats(_torch(self._map(info)).view(whole).view(info.shape), label)
        floats = expand(self._map(info), self._type(info)).view(info.shape)
        return checked_floats(floats * self._factor(info).view(-1, *[1] * (len(info.shape) - 1)), label)

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`; blocks stay blocks unless `quantize` is "none"."""
        info = find(name, self.header.tensors, self.path)
        check_request(name, info.shape, quantize, rows)
        kind = self._type(info)
        stored, order = self._map(info), None if rows is None else rows.numpy()
        count, columns = (math.prod(info.shape[:-1]) if order is None else order.size), info.shape[-1]
        label = f"{info.file}: tensor {name!r}"

        def read(start: int, stop: int) -> Bytes:
            return stored[start:stop] if order is None else stored[order[start:stop]]

        if (native := FLOATS.get(kind)) is not None:
            floats = _torch(read(0, count)).view(native)  # [N, K]
            return convert(floats, dtype, quantize, name=label)
        factor = self._one_factor(info)
        if quantize == "none":
            dense = torch.empty(count, columns, dtype=dtype)
            for start, stop in chunks(count, columns):
                dense[start:stop] = factor * expand(read(start, stop), kind)
            return checked_dense(dense, label)
        ours = BLOCKS[kind]
        with one_torch_thread():  # as fast as two on an idle machine, and much faster on a busy one
            weight = pack(
                count, columns, ours.bits, lambda i, j: blocks_of(read(i, j), kind, factor), label, ours.table
            )
        self._tell(weight, lambda: factor * expand(read(0, min(count, _MEASURED)), kind), info)
        return weight

    def table(self, name: str) -> StoredRows:
        """Return the matrix `name`, whose rows stay in the file, in their own type."""
        info = find(name, self.header.tensors, self.path)
        check_request(name, info.shape, None, None)
        kind, factor, (rows, columns) = self._type(info), self._one_factor(info), info.shape
        size = info.nbytes // rows
        return StoredRows(info.file, info.offset, (rows, columns), size, lambda raw: factor * expand(raw, kind))

    def float_type(self, name: str) -> torch.dtype | None:
        """Return the type of a tensor of floats; None where it is in blocks."""
        return FLOATS.get(find(name, self.header.tensors, self.path).type)

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of a matrix that `weight` makes, or of a vector that `tensor` makes, in
        `dtype`."""
        info = find(name, self.header.tensors, self.path)
        kind = self._type(info)
        if kind in FLOATS or quantize == "none" or len(info.shape) < 2:
            return stored_bytes(info.shape, quantize, dtype)
        ours = BLOCKS[kind]
        return block_bytes(info.shape, ours.bits, ours.minimum, ours.sub)

    def _type(self, info: TensorInfo) -> Type:
        """Return the type of a tensor that is needed. Raises ValueError for one that is not read."""
        kind = info.type
        if isinstance(kind, Type) and (kind in FLOATS or kind in BLOCKS):
            return kind
        if kind in INTEGERS and len(info.shape) < 2:
            return Type(kind)
        known = ", ".join(other.name for other in (*FLOATS, *BLOCKS))
        raise ValueError(
            f"{info.file}: tensor {info.name!r} is stored as {name_of(kind)}, which is not supported; choose a file "
            f"that uses only {known} (for example Q4_0, Q4_K_M or Q8_0)"
        )

    def _is_scale(self, name: str) -> bool:
        stem, _, end = name.rpartition(".")
        of = self.header.tensors.get(f"{stem}.weight")
        return end in ("scale", "input_scale") and of is not None and of.type == Type.NVFP4

    def _one_factor(self, info: TensorInfo) -> float:
        """Return the scale of a whole tensor of NVFP4; 1 of other types. Raises ValueError where experts have one
        each."""
        factor = self._factor(info)
        if factor.numel() > 1:
            raise ValueError(
                f"{info.file}: tensor {info.name!r} holds experts in NVFP4 with a scale each, which is not supported; "
                "choose a file in another type, such as Q4_0"
            )
        return float(factor)

    def _factor(self, info: TensorInfo) -> Tensor:
        """Return the scale of a whole tensor of NVFP4, or of each expert: float32 [1] or [experts], in the file beside
        it; 1 where there is none."""
        beside = self.header.tensors.get(info.name.removesuffix("weight") + "scale")
        if info.type != Type.NVFP4 or beside is None:
            return torch.ones(1, dtype=torch.float32)
        factor = self.tensor(beside.name).flatten()
        if factor.numel() not in (1, info.shape[0] if len(info.shape) > 2 else 1):
            raise ValueError(
                f"{info.file}: tensor {beside.name!r} of shape {beside.shape} is no scale of {info.name!r}"
            )
        return factor

    def _tell(self, weight: BlockWeight, first: Callable[[], Tensor], info: TensorInfo) -> None:
        """Warn, once for each type, that blocks were rounded, with the error on the first rows, which are `first()`
        [R, K] in the file."""
        if info.type in self._told or info.type in USUAL or BLOCKS[self._type(info)].exact:
            return
        self._told.add(info.type)
        theirs = first()
        rounded = weight.rows(torch.arange(len(theirs), dtype=torch.int64), torch.float32)
        size, whole = math.prod(weight.shape), float(theirs.square().sum())
        if (lost := float((rounded - theirs).square().sum())) == 0:
            return
        warnings.warn(
            f"{self.path}: {name_of(info.type)} takes {8 * weight.nbytes / size:.1f} bits a weight in memory, and "
            f"{8 * info.nbytes / math.prod(info.shape):.1f} in the file; relative squared error "
            f"{lost / whole if whole else 1.0:.1e}, measured on {one_line(info.name)}",
            stacklevel=3,
        )

    def _map(self, info: TensorInfo) -> Bytes:
        """Map the tensor's bytes read-only: [rows, bytes of a row]."""
        rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        shape = (rows, info.nbytes // rows)
        return np.memmap(info.file, dtype=np.uint8, mode="r", offset=info.offset, shape=shape)


def blocks_of(data: Bytes, kind: Type, factor: float = 1.0) -> NaturalHalves:
    """Return rows of bytes [R, bytes], of a type of blocks, as blocks of ours in plain order, times `factor`."""
    part, ours = _torch(data), BLOCKS[kind]
    found = ours.read(part.view(len(part), -1, ours.nbytes))  # [R, blocks of a row, bytes of a block]
    return found if factor == 1 else (found[0], found[1].float() * factor, *found[2:])


def name_of(kind: int) -> str:
    """Return what ggml calls the type `kind`; its number where the `gguf` package does not know it."""
    return kind.name if isinstance(kind, Type) else f"the unknown type {kind}"


def _torch(data: Bytes) -> Tensor:
    return torch.from_numpy(np.array(data))  # a copy: torch wants to own what it can write to
