"""The header of a GGUF file: its metadata, and where each tensor lies.

What: `read_header` gives the metadata as plain Python values and one `TensorInfo` per tensor, without touching the
weights. Why: the `gguf` package reads the file, but it makes four numpy objects for every entry of a vocabulary
(seconds for Gemma's 262,144) and trusts every length it finds. `_Reader` keeps the package's walk over the file and
replaces three steps: arrays are read whole, every access is checked against the end of the file first, and tensors are
described instead of mapped. Left out: writing, big-endian files, arrays of arrays (no published model has them). Source
of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

from specdec.weights.metadata import naming

MAX_ARRAY = 1 << 22  # entries of one metadata array: ten times the largest vocabularies and merge lists
MAX_TEXT = 1 << 28  # bytes of one string
MAX_NAME = 65535  # bytes of a key or a tensor's name
MAX_DIMENSIONS = 4
MAX_KEYS, MAX_TENSORS = 1 << 13, 1 << 15  # a hundred times what models have, and a second's work
_ABSURD = 1 << 50  # a "missing" byte beyond this means a damaged length, not a file that was cut short
_PREAMBLE = struct.Struct("<4sIQQ")  # magic, version, tensor count, metadata count
_LENGTH = struct.Struct("<Q")
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class TensorInfo:
    """Describe one tensor: `shape` in torch order, (out, in) for a matrix; `offset` in bytes from the file's start.
    `type`: a plain number where the `gguf` package does not know it; `nbytes` is 0 then, and the tensor cannot be
    read."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int
    file: Path


@dataclass(frozen=True)
class GGUFHeader:
    """Hold the header of a GGUF file. `metadata` holds int, float, bool, str, and lists of those; `tensors` keeps the
    order of the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read metadata and tensor table of the GGUF file (version 2 or 3, little endian) at `path`.

    Raises ValueError, naming the file and what to do, when it is missing, not GGUF, cut short or damaged: all tensors
    of the returned header lie inside the file. Nothing is allocated for a length that the file cannot hold.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    check_preamble(file)
    with naming(file):
        return _read(file)


def _read(file: Path) -> GGUFHeader:
    try:
        reader = _Reader(file)
        return GGUFHeader(file, reader.values(), reader.table)
    except _BadHeaderError as error:
        raise ValueError(str(error)) from None
    except (ValueError, KeyError, OverflowError) as error:  # raised by the package: they do not name the file
        raise _damaged(file, str(error).strip("'")) from error


class _BadHeaderError(Exception):
    """Carry a complete message for the user (not a ValueError, so that it is told from those of the package)."""


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file}: damaged GGUF header ({what}); delete the file and fetch it again")


def _cut_short(file: Path, size: int, needed: int) -> str:
    if needed > _ABSURD:
        return str(_damaged(file, "a length in it is larger than any disk"))
    return f"{file}: the download is incomplete: {size} bytes, expected at least {needed}; delete it and fetch it again"


def check_preamble(file: Path) -> None:
    """Raise a ValueError when a file does not begin as a GGUF file that is read here does."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_PREAMBLE.size)
    if start[:4] != _MAGIC[: len(start)]:
        raise ValueError(f"{file}: not a GGUF file (it starts with {start[:4]!r}); name a .gguf file")
    if len(start) < _PREAMBLE.size:
        raise ValueError(_cut_short(file, size, _PREAMBLE.size))
    _, version, tensors, fields = _PREAMBLE.unpack(start)
    if version and version & 0xFFFF == 0:
        raise ValueError(f"{file}: a big-endian GGUF file; convert it with `gguf-convert-endian FILE little`")
    if version not in (2, 3):
        raise ValueError(f"{file}: GGUF version {version} is not supported (2 and 3 are); convert the model again")
    # The smallest entries: a key without a name and one byte; a tensor without a name or dimensions.
    needed = _PREAMBLE.size + 13 * fields + 24 * tensors
    if needed > size:
        raise ValueError(_cut_short(file, size, needed))
    if fields > MAX_KEYS or tensors > MAX_TENSORS:
        raise _damaged(file, f"{fields} keys and {tensors} tensors")


class _Reader(GGUFReader):  # type: ignore[misc]
    """Read a header with the package's reader, within bounds; `table` replaces its list of mapped tensors."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.table: dict[str, TensorInfo] = {}
        self._names: set[str] = set()
        super().__init__(file, "r")

    @property
    def data(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._bytes = mapped.view(np.ndarray)  # the same pages; slicing a np.memmap costs ten times more

    def values(self) -> dict[str, Any]:
        """Return every metadata key with its Python value."""
        own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}  # the package's own entries, not keys
        return {name: self._value(field) for name, field in self.fields.items() if name not in own}

    def _value(self, field: Any) -> Any:
        last = field.parts[-1]
        if field.types[0] == GGUFValueType.ARRAY:
            return last if isinstance(last, list) else last.tolist()
        return field.contents()

    def _fail(self, what: str) -> NoReturn:
        raise _BadHeaderError(str(_damaged(self.file, what)))

    def _require(self, end: int) -> None:
        if end > self._bytes.size:
            raise _BadHeaderError(_cut_short(self.file, self._bytes.size, end))

    # The steps of GGUFReader that are replaced.

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self._require(int(offset) + np.dtype(dtype).itemsize * int(count))
        return super()._get(offset, dtype, count, override_order)

    def _get_str(self, offset: int) -> tuple[Any, Any]:
        length = int(self._get(offset, np.uint64)[0])
        self._require(offset + 8 + length)
        if length > MAX_TEXT:
            self._fail(f"a string of {length} bytes")
        parts: tuple[Any, Any] = super()._get_str(offset)
        return parts

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != GGUFValueType.ARRAY:
            size, parts, indices, types = super()._get_field_parts(orig_offs, raw_type)
            return size, parts, indices, types
        raw = self._get(orig_offs, np.uint32)
        length = self._get(orig_offs + 4, np.uint64)
        kind, count, start = GGUFValueType(raw[0]), int(length[0]), orig_offs + 12
        scalar = self.gguf_scalar_to_np.get(kind)
        if kind == GGUFValueType.ARRAY or (scalar is None and kind != GGUFValueType.STRING):
            self._fail(f"an array of {kind.name}")
        self._require(start + count * (8 if scalar is None else np.dtype(scalar).itemsize))
        if count > MAX_ARRAY:
            self._fail(f"an array of {count} entries")
        if scalar is None:
            values, end = self._strings(start, count)
        else:
            values = self._get(start, scalar, count)
            end = start + values.nbytes
        return end - orig_offs, [raw, length, values], [2], [GGUFValueType.ARRAY, kind]

    def _strings(self, offset: int, count: int) -> tuple[list[str], int]:
        """Return `count` strings from `offset` on, and the offset after them."""
        buffer, size, read = memoryview(self._bytes.data), self._bytes.size, _LENGTH.unpack_from
        strings = []
        for _ in range(count):
            begin = offset + 8
            if begin > size:
                self._require(begin)
            offset = begin + read(buffer, offset)[0]
            if offset > size:
                self._require(offset)
            strings.append(str(buffer[begin:offset], "utf-8"))
        return strings, offset

    def _get_tensor_info_field(self, orig_offs: int) -> Any:
        # Checked first: the package would read `dimensions` numbers, and compare names only at the end.
        name_bytes = self._get_str(orig_offs)[1]
        if name_bytes.size > MAX_NAME:
            self._fail(f"a tensor's name of {name_bytes.size} bytes")
        name = str(bytes(name_bytes), "utf-8")
        if name in self._names:
            self._fail(f"two tensors are called {name!r}")
        self._names.add(name)
        dimensions = int(self._get(orig_offs + 8 + name_bytes.size, np.uint32)[0])
        if dimensions > MAX_DIMENSIONS:
            self._fail(f"tensor {name!r} has {dimensions} dimensions")
        return super()._get_tensor_info_field(orig_offs)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        start, alignment, end = int(start_offs), int(self.alignment), 0
        if alignment <= 0 or alignment & (alignment - 1):
            self._fail(f"an alignment of {alignment} bytes")
        for field in fields:
            _, _, _, dims, raw_type, raw_offset = field.parts
            info = self._describe(field.name, dims.tolist(), int(raw_type[0]), start + int(raw_offset[0]))
            if int(raw_offset[0]) % alignment:
                self._fail(f"tensor {info.name!r} is not aligned to {alignment} bytes")
            self.table[info.name] = info
            end = max(end, info.offset + info.nbytes)
        self._require(end)

    def _describe(self, name: str, dims: list[int], raw_type: int, offset: int) -> TensorInfo:
        try:
            kind = GGMLQuantizationType(raw_type)
        except ValueError:
            return TensorInfo(name, tuple(reversed(dims)), raw_type, offset, 0, self.file)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in dims or (dims[0] if dims else 1) % block:
            self._fail(f"tensor {name!r} of shape {dims} cannot be {kind.name}, which has blocks of {block}")
        nbytes = prod(dims) // block * block_bytes
        # ggml lists the axis that varies fastest first, torch last.
        return TensorInfo(name, tuple(reversed(dims)), kind, offset, nbytes, self.file)
