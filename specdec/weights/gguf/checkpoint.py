"""GGUF files as a checkpoint: llama.cpp's blocks become ours, without a detour through floats where they fit.

What: `GGUFCheckpoint` reads the tensors of a file, or of all parts of a split one.

| type | becomes | exact? |
|---|---|---|
| Q4_0, Q4_1 | 4 bits, without and with minimum | yes |
| Q5_0, Q5_1 | 5 bits, without and with minimum | yes |
| Q8_0 | 8 bits | yes |
| Q8_K | 8 bits | the scale is rounded to float16 |
| Q1_0 | 2 bits with minimum; a factor of the scale for each 16 inputs | yes |
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
one tensor. NVFP4 has a scale of the whole tensor, or one of each expert, in a tensor of its own, "X.scale" beside
"X.weight". What experts' outputs are multiplied by has the same name in other files, and llama.cpp's converter makes
one number of the two: it is left to the model.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from specdec.kernels import BLOCK
from specdec.util.threads import one_torch_thread
from specdec.weights.checkpoint import StoredRows, check_request, checked_floats, exact_floats, find
from specdec.weights.fit import NaturalHalves
from specdec.weights.gguf.blocks import BLOCKS, FLOATS, INTEGERS, USUAL
from specdec.weights.gguf.floats import Bytes, expand, name_of
from specdec.weights.gguf.header import GGUFHeader, TensorInfo
from specdec.weights.gguf.split import read_parts
from specdec.weights.metadata import one_line
from specdec.weights.tensors import (
    BlockWeight,
    QuantizedStorage,
    Storage,
    Weight,
    block_bytes,
    checked_dense,
    chunks,
    convert,
    is_on_lattice,
    pack,
    stored_bytes,
)

_MEASURED = 256  # rows on which the error of rounding is measured


class GGUFCheckpoint:
    """Read the tensors of a GGUF file, with all parts of a split one (see `specdec.weights.checkpoint.Checkpoint` for
    the methods).

    Raises ValueError when a part is missing or damaged (`gguf.header.read_header`); a method does when a tensor is
    stored in a type that is not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.header: GGUFHeader = read_parts(path)
        self._told = set[int]()
        self._lattices: dict[tuple[str, QuantizedStorage], bool] = {}

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
        floats = expand(self._map(info), self._type(info))
        return checked_floats((floats * self._factor(info)).view(info.shape), label)

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
        factors = self._factor(info).expand(math.prod(info.shape[:-1]), 1)
        factors = factors if rows is None else factors[rows]
        if quantize == "none":
            dense = torch.empty(count, columns, dtype=dtype)
            for start, stop in chunks(count, columns):
                dense[start:stop] = factors[start:stop] * expand(read(start, stop), kind)
            return checked_dense(dense, label)
        ours = BLOCKS[kind]
        with one_torch_thread():  # as fast as two on an idle machine, and much faster on a busy one
            weight = pack(
                count, columns, ours.bits, lambda i, j: blocks_of(read(i, j), kind, factors[i:j]), label, ours.table
            )
        few = min(count, _MEASURED)
        self._tell(weight, lambda: factors[:few] * expand(read(0, few), kind), info)
        return weight

    def table(self, name: str) -> StoredRows:
        """Return the matrix `name`, whose rows stay in the file, in their own type."""
        info = find(name, self.header.tensors, self.path)
        check_request(name, info.shape, None, None)
        kind, factor, (rows, columns) = self._type(info), float(self._factor(info)), info.shape
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
        if quantize in ("int4", "int8") and self._on_lattice(info, quantize):
            return block_bytes(info.shape, 4, False)
        if kind in FLOATS or quantize == "none" or len(info.shape) < 2:
            return stored_bytes(info.shape, quantize, dtype)
        ours = BLOCKS[kind]
        return block_bytes(info.shape, ours.bits, ours.minimum, ours.sub)

    def _on_lattice(self, info: TensorInfo, quantize: QuantizedStorage) -> bool:
        """Return whether a tensor is a matrix of floats that was trained for 4 bits, by a few of its rows."""
        kind = FLOATS.get(info.type)
        if kind is None or len(info.shape) < 2 or info.shape[-1] % BLOCK or 0 in info.shape:
            return False
        if (info.name, quantize) not in self._lattices:
            floats = torch.from_numpy(self._map(info, mode="c")).view(kind)  # pages of the file, not memory
            self._lattices[info.name, quantize] = is_on_lattice(floats, quantize)
        return self._lattices[info.name, quantize]

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
        if end not in ("scale", "input_scale") or of is None or of.type != Type.NVFP4:
            return False
        return end == "input_scale" or not self._is_of_outputs(name)

    def _is_of_outputs(self, name: str) -> bool:
        """Tell whether the tensor `name` is what experts' outputs are multiplied by: what a model of experts needs."""
        layer, _, end = name.rpartition("ffn_down_exps.")
        return end == "scale" and f"{layer}ffn_gate_inp.per_expert_scale" not in self.header.tensors

    def _factor(self, info: TensorInfo) -> Tensor:
        """Return the scale of a whole tensor of NVFP4, float32 [1, 1], or where experts have one each that of every
        row, [rows, 1], in the file beside it; 1 where there is none."""
        beside = self.header.tensors.get(info.name.removesuffix("weight") + "scale")
        if info.type != Type.NVFP4 or beside is None or self._is_of_outputs(beside.name):
            return torch.ones(1, 1, dtype=torch.float32)
        factor = self.tensor(beside.name).flatten()
        if factor.numel() not in (1, info.shape[0] if len(info.shape) > 2 else 1):
            raise ValueError(
                f"{info.file}: tensor {beside.name!r} of shape {beside.shape} is no scale of {info.name!r}"
            )
        each = info.shape[-2] if factor.numel() > 1 else 1
        return factor.repeat_interleave(each)[:, None]

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

    def _map(self, info: TensorInfo, mode: Literal["r", "c"] = "r") -> Bytes:
        """Map the tensor's bytes, [rows, bytes of a row]: read-only, or in mode "c" as torch wants to have them."""
        rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        shape = (rows, info.nbytes // rows)
        return np.memmap(info.file, dtype=np.uint8, mode=mode, offset=info.offset, shape=shape)


def blocks_of(data: Bytes, kind: Type, factors: Tensor | None = None) -> NaturalHalves:
    """Return rows of bytes [R, bytes], of a type of blocks, as blocks of ours in plain order; those of NVFP4 times
    `factors` [R, 1]."""
    part, ours = _torch(data), BLOCKS[kind]
    found = ours.read(part.view(len(part), -1, ours.nbytes))  # [R, blocks of a row, bytes of a block]
    if factors is None or kind != Type.NVFP4:
        return found
    return (found[0], found[1].float() * factors, *found[2:])


def _torch(data: Bytes) -> Tensor:
    return torch.from_numpy(np.array(data))  # a copy: torch wants to own what it can write to
