"""GGUF files as a checkpoint: llama.cpp's blocks become ours, without a detour through floats where they fit.

What: `GGUFCheckpoint` reads F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K.

| type | becomes | exact? |
|---|---|---|
| Q4_0, Q4_1 | 4 bits, without and with minimum | yes |
| Q5_0, Q5_1 | 5 bits, without and with minimum | yes |
| Q8_0 | 8 bits | yes |
| Q4_K, Q5_K | 4 and 5 bits with minimum | their products `d * scale` and `dmin * min` are rounded to float16 |
| Q6_K | 8 bits, quantised again | |error| <= max|w| of 32 inputs / 254 |

Why each access maps its tensor anew: the mapping ends with the call, so the resident memory of a load never
holds more of the file than one tensor. Left out: the types below 4 bits and the IQ family (llama.cpp's
look-up tables), and split files. Source of the bit layouts:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from torch import Tensor

from specdec.kernels import BLOCK
from specdec.util.threads import one_torch_thread
from specdec.weights.checkpoint import check_request, checked_floats, find
from specdec.weights.fit import Natural, fit_int8
from specdec.weights.gguf.header import GGUFHeader, TensorInfo, read_header
from specdec.weights.tensors import (
    Storage,
    Weight,
    block_bytes,
    checked_dense,
    chunks,
    convert,
    pack,
    stored_bytes,
)

Bytes = npt.NDArray[np.uint8]


class GGUFCheckpoint:
    """The tensors of one GGUF file (see `specdec.weights.checkpoint.Checkpoint` for the methods).

    Raises ValueError when the file is damaged (`gguf.header.read_header`) or holds other types.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.header: GGUFHeader = read_header(path)
        for info in self.header.tensors.values():
            if info.type not in _FLOATS and info.type not in _BLOCKS and info.type not in _REQUANTISED:
                known = ", ".join(kind.name for kind in (*_FLOATS, *_BLOCKS, *_REQUANTISED))
                raise ValueError(
                    f"{path}: tensor {info.name!r} is stored as {info.type.name}, which is not supported; "
                    f"choose a file that uses only {known} (for example Q4_0, Q4_K_M or Q8_0)"
                )

    @property
    def path(self) -> Path:
        """Return the file."""
        return self.header.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape in torch's order."""
        return {name: info.shape for name, info in self.header.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32, dequantised by the `gguf` package."""
        info = find(name, self.header.tensors, self.path)
        floats = _floats(self._map(info), info.type).view(info.shape)
        return checked_floats(floats, f"{self.path}: tensor {name!r}")

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`; blocks stay blocks unless `quantize` is "none"."""
        info = find(name, self.header.tensors, self.path)
        check_request(name, info.shape, quantize, rows)
        stored, order = self._map(info), None if rows is None else rows.numpy()
        count, columns = (info.shape[0] if order is None else order.size), info.shape[1]
        label = f"{self.path}: tensor {name!r}"

        def read(start: int, stop: int) -> Bytes:
            return stored[start:stop] if order is None else stored[order[start:stop]]

        if (native := _FLOATS.get(info.type)) is not None:
            floats = _torch(read(0, count)).view(native)  # [N, K]
            return convert(floats, dtype, quantize, name=label)
        if quantize == "none":
            dense = torch.empty(count, columns, dtype=dtype)
            for start, stop in chunks(count, columns):
                dense[start:stop] = _floats(read(start, stop), info.type)
            return checked_dense(dense, label)
        if info.type in _BLOCKS:
            bits, size, unpack = _BLOCKS[info.type]

            def blocks(start: int, stop: int) -> Natural:
                part = _torch(read(start, stop))
                return unpack(part.view(stop - start, -1, size))  # [R, blocks of a row, bytes of a block]

            with one_torch_thread():  # as fast as two on an idle machine, and much faster on a busy one
                return pack(count, columns, bits, blocks, label)

        def again(start: int, stop: int) -> Natural:
            return fit_int8(_floats(read(start, stop), info.type))

        return pack(count, columns, 8, again, label)

    def float_type(self, name: str) -> torch.dtype | None:
        """Return the type of a tensor of floats; None where it is in blocks."""
        return _FLOATS.get(find(name, self.header.tensors, self.path).type)

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of a matrix that `weight` makes, or of a vector that `tensor` makes, in
        `dtype`."""
        info = find(name, self.header.tensors, self.path)
        if info.type in _FLOATS or quantize == "none" or len(info.shape) != 2:
            return stored_bytes(info.shape, quantize, dtype)
        if info.type in _BLOCKS:
            return block_bytes(info.shape, _BLOCKS[info.type][0], info.type in _WITH_MINIMUM)
        return block_bytes(info.shape, 8, False)

    def _map(self, info: TensorInfo) -> Bytes:
        """Map the tensor's bytes read-only: [rows, bytes of a row]."""
        rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        shape = (rows, info.nbytes // rows)
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=info.offset, shape=shape)


def _torch(data: Bytes) -> Tensor:
    return torch.from_numpy(np.array(data))  # a copy: torch wants to own what it can write to


def _floats(data: Bytes, kind: Type) -> Tensor:
    """Return rows of bytes [R, bytes] as float32 [R, K]."""
    return torch.from_numpy(dequantize(np.array(data), kind))


# One function for each type: bytes [R, B, size] to (values [R, K], scale [R, K/32], minimum).


def _q4_0(raw: Tensor) -> Natural:
    return _nibbles(raw[..., 2:]).flatten(1), _float16(raw[..., 0:2]), None


def _q4_1(raw: Tensor) -> Natural:
    return _nibbles(raw[..., 4:]).flatten(1), _float16(raw[..., 0:2]), _float16(raw[..., 2:4])


def _q5_0(raw: Tensor) -> Natural:
    return _fives(raw[..., 2:]).flatten(1), _float16(raw[..., 0:2]), None


def _q5_1(raw: Tensor) -> Natural:
    return _fives(raw[..., 4:]).flatten(1), _float16(raw[..., 0:2]), _float16(raw[..., 2:4])


def _q8_0(raw: Tensor) -> Natural:
    return raw[..., 2:].view(torch.int8).flatten(1), _float16(raw[..., 0:2]), None


def _q4_k(raw: Tensor) -> Natural:
    # 256 weights: 16 bytes of scales and minima, 128 bytes of nibbles.
    return _super_nibbles(raw[..., 16:]).flatten(1), *_super_scales(raw)


def _q5_k(raw: Tensor) -> Natural:
    # 256 weights: 16 bytes of scales and minima, 32 bytes of fifth bits, 128 bytes of nibbles.
    # Bit s of byte j is the fifth bit of value 32s + j.
    fifth = raw[..., None, 16:48] >> _EIGHT[:, None] & 1  # [R, B, 8, 32]
    values = _super_nibbles(raw[..., 48:]) | fifth.flatten(2) << 4
    return values.flatten(1), *_super_scales(raw)


def _super_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of eight blocks that share float16 d and dmin: [R, B, 16 bytes and more] to [R, 8B]
    each."""
    d, dmin = _float16(raw[..., 0:2]).float(), _float16(raw[..., 2:4]).float()  # [R, B]
    first, second, mixed = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]  # [R, B, 4]
    # Six bits each. Blocks 0..3 have their own bytes; 4..7 have four bits in `mixed` and two on top of those bytes.
    scales = torch.cat([first & 63, mixed & 15 | first >> 2 & 48], dim=-1)  # [R, B, 8]
    minima = torch.cat([second & 63, mixed >> 4 | second >> 2 & 48], dim=-1)  # [R, B, 8]
    return (d[..., None] * scales).half().flatten(1), (-dmin[..., None] * minima).half().flatten(1)


def _super_nibbles(packed: Tensor) -> Tensor:
    """Unpack [R, B, 128] bytes to [R, B, 256] values 0..15: of 32 bytes the low nibbles, then the high ones."""
    return _nibbles(packed.view(*packed.shape[:2], 4, BLOCK)).flatten(2)


def _fives(packed: Tensor) -> Tensor:
    """Unpack [R, B, 20] bytes to [R, B, 32] values 0..31: fifth bits (bit i of byte j is value 8j + i's), then
    nibbles."""
    fifth = packed[..., :4, None] >> _EIGHT & 1  # [R, B, 4, 8]
    return _nibbles(packed[..., 4:]) | fifth.flatten(2) << 4


def _nibbles(packed: Tensor) -> Tensor:
    """Unpack [..., n] bytes to [..., 2n] values 0..15: the low nibbles, then the high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _float16(raw: Tensor) -> Tensor:
    """View [..., 2] bytes as [...] float16."""
    return raw.contiguous().view(torch.float16).squeeze(-1)


_EIGHT = torch.arange(8, dtype=torch.uint8)
_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_BLOCKS: dict[Type, tuple[int, int, Callable[[Tensor], Natural]]] = {  # bits, bytes of a block, reader
    Type.Q4_0: (4, 18, _q4_0),
    Type.Q4_1: (4, 20, _q4_1),
    Type.Q5_0: (5, 22, _q5_0),
    Type.Q5_1: (5, 24, _q5_1),
    Type.Q8_0: (8, 34, _q8_0),
    Type.Q4_K: (4, 144, _q4_k),
    Type.Q5_K: (5, 176, _q5_k),
}
_WITH_MINIMUM = (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K)
_REQUANTISED = (Type.Q6_K,)
