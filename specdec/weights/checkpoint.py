"""The methods of every checkpoint reader, and the checks that they share.

What: `Checkpoint` is the protocol behind which safetensors and GGUF look alike: names with shapes, small tensors as
float32, matrices as `Weight`s. Why: a loader written against it streams tensor by tensor, so that peak memory is the
loaded model plus one tensor. Left out: writing checkpoints, and anything that runs code from a file (pickle).
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol, TypeVar, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.kernels import dense_linear
from specdec.util.threads import one_torch_thread
from specdec.weights.metadata import one_line, quote
from specdec.weights.tensors import Storage, Weight

Entry = TypeVar("Entry")
Bytes = npt.NDArray[np.uint8]


class Checkpoint(Protocol):
    """Read named tensors on disk when they are asked for. Nothing is cached: each call reads the file again."""

    @property
    def path(self) -> Path:
        """Return the file, or the folder of a sharded checkpoint."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape in torch's order, (out, in) for matrices."""

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of a matrix that `weight` makes, or of a vector that `tensor` makes, in
        `dtype`."""

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32 on the CPU, dequantised: for norms, scalars and biases.

        Raises ValueError when there is no such tensor.
        """

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name` [N, K] on the CPU, ready to multiply; of a tensor [E, N, K] the matrix [E * N, K].

        `quantize`: None keeps the storage (GGUF blocks stay blocks, floats become `dtype`); "int4" and "int8" quantise
        floats and leave blocks alone; "none" turns everything into `dtype`. A float matrix whose K is not a multiple of
        32 has no blocks: it stays in `dtype` whatever `quantize` says. `rows` [M] long picks output rows in this order
        before packing (a permutation, or a subset). Raises ValueError for an unknown name, a tensor that is not a
        matrix, rows out of range, and values that the storage cannot hold.
        """


@runtime_checkable
class RowSource(Protocol):
    """Give matrices of a checkpoint that stay in their files."""

    def table(self, name: str) -> StoredRows:
        """Return the matrix `name`, each row of which is read from its file when it is asked for."""


class StoredRows:
    """Read rows of a matrix [N, K] that stays in a file: an embedding of which a token needs one row (it is a
    `Weight`).

    A row is read when it is asked for, and not mapped: mapped pages would add up in this process, row after row. The
    file stays open, so that the rows are those of the file that was opened whatever takes its place.
    """

    packed: None = None
    nbytes = 0  # in memory

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, int], row_bytes: int, decode: Callable[[Bytes], Tensor]
    ) -> None:
        """Read rows of `row_bytes` each from `offset` on. `decode`: bytes [R, row_bytes] to float32 [R, K]."""
        self.path, self.shape = path, shape
        self._offset, self._row_bytes, self._decode = offset, row_bytes, decode
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `ids` [T] as `dtype` [T, K] on the device of `ids`. Raises IndexError for an id that is no row,
        ValueError where the file has become shorter or a row is not finite."""
        wanted: list[int] = ids.tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < self.shape[0]:
            raise IndexError(f"ids must be from 0 to {self.shape[0] - 1}, got {wanted}")
        raw = np.empty((len(wanted), self._row_bytes), dtype=np.uint8)
        for row, number in zip(raw, wanted, strict=True):
            read = self._read(self._offset + number * self._row_bytes)
            if len(read) != self._row_bytes:
                raise ValueError(f"{self.path}: has become shorter while it was in use; fetch it again")
            row[:] = np.frombuffer(read, dtype=np.uint8)
        with one_torch_thread():
            return checked_floats(self._decode(raw), str(self.path)).to(ids.device, dtype)

    def _read(self, at: int) -> bytes:
        if sys.platform != "win32":  # forks of a process share the place at which a file is read next
            return os.pread(self._file.fileno(), self._row_bytes, at)
        with self._lock:
            self._file.seek(at)
            return self._file.read(self._row_bytes) or b""

    def linear(self, x: Tensor) -> Tensor:
        """Return x [T, K] times the transpose of the matrix: [T, N] in x's dtype."""
        return dense_linear(x, self.dequantize().to(x))

    def dequantize(self) -> Tensor:
        """Return the whole matrix as float32 [N, K]."""
        return self.rows(torch.arange(self.shape[0], dtype=torch.int64), torch.float32)

    def to(self, device: torch.device | str) -> StoredRows:
        """Return the same matrix, whose rows have no device."""
        return self


def offset_in_safetensors(shard: Path, name: str) -> int:
    """Return the byte of a file at which the tensor `name` begins: the file has been opened before, and is whole."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin: int = json.loads(file.read(length))[name]["data_offsets"][0]
    return 8 + length + begin


class JoinedCheckpoint:
    """Join two checkpoints, the second of which has tensors that the first lacks: parts of a model in two files."""

    def __init__(self, first: Checkpoint, second: Checkpoint) -> None:
        self.first, self.second = first, second
        self._second = frozenset(second.shapes()) - frozenset(first.shapes())

    @property
    def path(self) -> Path:
        """Return the file of the first."""
        return self.first.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape."""
        return {**self.second.shapes(), **self.first.shapes()}

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of the tensor, as its checkpoint counts them."""
        return self._of(name).loaded_bytes(name, dtype, quantize)

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32."""
        return self._of(name).tensor(name)

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`, as its checkpoint makes it."""
        return self._of(name).weight(name, dtype, quantize, rows)

    def _of(self, name: str) -> Checkpoint:
        return self.second if name in self._second else self.first


def find(name: str, entries: Mapping[str, Entry], path: Path) -> Entry:
    """Return `entries[name]`. Raises ValueError, naming the nearest tensors, where there is none."""
    if name in entries:
        return entries[name]
    close = get_close_matches(name, entries, n=3)
    hint = f"; near it: {', '.join(map(one_line, close))}" if close else ""
    raise ValueError(f"{path}: there is no tensor {quote(name)} among its {len(entries)}{hint}")


def checked_floats(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor`, the result of `Checkpoint.tensor`. Raises ValueError when a value is not finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds values that are not finite; fetch the checkpoint again")
    return tensor


def exact_floats(whole: Tensor, name: str) -> Tensor:
    """Return `whole`, integers of any type, as float32. Raises ValueError when float32 cannot hold all of them."""
    floats = whole.to(torch.float32)
    if not torch.equal(floats.to(whole.dtype), whole):
        raise ValueError(f"{name} holds integers beyond the exact range of float32")
    return floats


def check_request(name: str, shape: tuple[int, ...], quantize: Storage, rows: Tensor | None) -> None:
    """Check the arguments of `Checkpoint.weight` that need no file. Raises its ValueErrors."""
    if quantize is not None and quantize not in get_args(get_args(Storage)[0]):
        raise ValueError(f"quantize={quantize!r} is not known; use 'int4', 'int4-all', 'int8', 'none' or None")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"tensor {name!r} of shape {shape} is not a matrix; read it with tensor()")
    if rows is None:
        return
    if rows.ndim != 1 or rows.dtype != torch.long or rows.numel() == 0:
        raise ValueError(f"rows for {name!r} must be a non-empty vector of torch.long, not {rows.dtype} {rows.shape}")
    low, high, count = int(rows.min()), int(rows.max()), math.prod(shape[:-1])
    if low < 0 or high >= count:
        raise ValueError(f"rows {low}..{high} for {name!r} leave its {count} rows; use 0..{count - 1}")
