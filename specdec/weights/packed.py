"""A model in one file, as it is multiplied: a quantised checkpoint kept for the next start.

What: `packing` adds tensor after tensor and gives the file its name at the end, so that there is never half of one;
`PackedFile` maps it. Why a format of our own: blocks are stored as the kernels read them, each part on a boundary of 64
bytes, and the index comes last because nothing has to be known before the first tensor is written.

    "SPECDEC1", zeros up to 64 | parts of tensors, each padded to 64 | index, JSON | footer

The footer holds the index's length (8 bytes, little endian), its SHA-256 and "SPECDEC1" again: a file that was cut
short or written over at its end is known without reading the rest. `verify` reads the rest. Left out: compression, and
files for other machines: bytes are in this machine's order.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from specdec.kernels import BlockTensor
from specdec.util.atomic import replacing
from specdec.weights.metadata import Values, quote
from specdec.weights.tensors import BlockWeight, DenseWeight, Weight

MAGIC = b"SPECDEC1"
ALIGNMENT = 64
_FOOTER = 8 + 32 + len(MAGIC)
_CHUNK = 64 << 20  # bytes checked at once
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.uint8)}


class Part(NamedTuple):
    """Describe the place of a tensor, or of a part of one, in the file: `at` byte, with dtype, shape and checksum."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    crc: int


class Entry(NamedTuple):
    """Describe a tensor of the index; `blocks`: bits, rows and columns of a matrix in blocks, whose parts are
    `present`; `table`: what its codes mean."""

    parts: tuple[Part, ...]
    blocks: tuple[int, int, int] | None
    present: tuple[str, ...] = ()
    table: str | None = None


def read_index(tensors: Mapping[str, Any], end: int) -> dict[str, Entry]:
    """Return the entries of an index whose tensors lie before byte `end` of the file.

    Raises ValueError for parts that lie outside, overlap, or are not those of such a matrix.
    """
    found = {name: _entry(Values(tensors).inner(name)) for name in tensors}
    free = ALIGNMENT
    for part in sorted((part for entry in found.values() for part in entry.parts), key=lambda part: part.at):
        if part.at < free or part.at % ALIGNMENT:
            raise ValueError(f"a tensor at {part.at} overlaps another, or is not aligned")
        free = part.at + math.prod(part.shape) * part.dtype.itemsize
    if free > end:
        raise ValueError("a tensor ends beyond the file")
    return found


def _entry(values: Values) -> Entry:
    parts = tuple(_part(Values({"part": part}).inner("part")) for part in values.sequence("parts"))
    if not values.has("bits"):
        if len(parts) != 1:
            raise ValueError(f"a tensor of floats has {len(parts)} parts")
        return Entry(parts, None)
    sub = values.has("sub")
    present = ("q", "scale", *(["minimum"] if len(parts) - sub == 3 else []), *(["sub"] if sub else []))
    if len(parts) != len(present):
        raise ValueError(f"a matrix in blocks has {len(parts)} parts")
    shape = (values.whole("bits"), values.whole("rows", 1), values.whole("columns", 1))
    return Entry(parts, shape, present, values.text("table") if values.has("table") else None)


def _part(values: Values) -> Part:
    dtype = values.text("dtype")
    if dtype not in _DTYPES:
        raise ValueError(f"there are no parts of {quote(dtype)}")
    shape = tuple(values.wholes("shape", 1))
    return Part(values.whole("at", high=1 << 62), _DTYPES[dtype], shape, values.whole("crc", high=(1 << 32) - 1))


class PackedWriter:
    """Write tensor after tensor to a file; made by `packing`."""

    def __init__(self, file: BinaryIO, about: dict[str, Any]) -> None:
        self._file, self._about = file, {**about, "byte_order": sys.byteorder}
        self._tensors: dict[str, Any] = {}
        self._put(MAGIC)

    def weight(self, name: str, weight: Weight) -> None:
        """Add a matrix. Raises OSError when the disk is full."""
        blocks = weight.packed
        if blocks is None:
            assert isinstance(weight, DenseWeight)
            self._tensors[name] = {"parts": [self._part(weight.tensor)]}
            return
        parts = [part for part in (blocks.q, blocks.scale, blocks.minimum, blocks.sub) if part is not None]
        shape: dict[str, Any] = {"bits": blocks.bits, "rows": blocks.rows, "columns": blocks.columns}
        shape |= {"table": blocks.table} if blocks.table is not None else {}
        shape |= {"sub": True} if blocks.sub is not None else {}
        self._tensors[name] = {**shape, "parts": [self._part(part) for part in parts]}

    def vector(self, name: str, tensor: Tensor) -> None:
        """Add a norm, bias or scalar."""
        self._tensors[name] = {"parts": [self._part(tensor)]}

    def _part(self, tensor: Tensor) -> dict[str, Any]:
        dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        assert dtype in _DTYPES, dtype
        raw = _bytes(tensor.contiguous())
        at = self._file.tell()
        self._put(raw)
        return {"at": at, "dtype": dtype, "shape": shape, "crc": zlib.crc32(raw)}

    def _put(self, raw: bytes | memoryview) -> None:
        self._file.write(raw)
        self._file.write(bytes(-len(raw) % ALIGNMENT))

    def finish(self) -> None:
        """Write index and footer, and wait until all of the file is on the disk."""
        index = json.dumps({"about": self._about, "tensors": self._tensors}).encode()
        self._file.write(index + len(index).to_bytes(8, "little") + hashlib.sha256(index).digest() + MAGIC)
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def packing(path: Path, about: dict[str, Any]) -> Iterator[PackedWriter]:
    """Give a writer of `path`, which is there when the block ends; an error inside leaves nothing behind.

    `about`: any JSON that tells what the file was made from. The reader of the file must expect the same.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = PackedWriter(file, about)
        yield writer
        writer.finish()


class ByteRange(NamedTuple):
    """Describe the bytes `begin` to `end` - 1 of a file."""

    begin: int
    end: int


class StaleError(ValueError):
    """Report that a packed file is whole, and was made from something else than what is there now."""


class PackedFile:
    """Map a packed file: its tensors are pages of the file, and take memory once they are read."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """Map the file `path`. Raises ValueError when it is damaged, StaleError when it was made from something else
        than `about`."""
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < ALIGNMENT + _FOOTER:
                raise self._damaged("it is cut short")
            # Private, because torch asks for writable memory; nobody writes.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        footer = self._memory[-_FOOTER:]
        length = int.from_bytes(footer[:8], "little")
        if footer[40:] != MAGIC or self._memory[: len(MAGIC)] != MAGIC or length > size - _FOOTER - ALIGNMENT:
            raise self._damaged("it is cut short")
        index = self._memory[size - _FOOTER - length : size - _FOOTER]
        if hashlib.sha256(index).digest() != footer[8:40]:
            raise self._damaged("its index was changed")
        found = self._parsed(index)
        if found.get("about") != {**about, "byte_order": sys.byteorder}:
            raise StaleError(f"{path}: was made from something else; delete it, and it is made again")
        # The hash does not tell whether `PackedWriter` or somebody else wrote the index.
        try:
            self._tensors = read_index(Values(found).mapping("tensors"), size - _FOOTER - length)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _parsed(self, index: bytes) -> dict[str, Any]:
        try:
            found = json.loads(index)
        except (ValueError, RecursionError) as error:
            raise self._damaged("its index is not JSON") from error
        if not isinstance(found, dict):
            raise self._damaged("its index is not an object")
        return found

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the index."""
        return list(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape, (out, in) for matrices."""
        return {
            name: tensor.blocks[1:] if tensor.blocks else tensor.parts[0].shape
            for name, tensor in self._tensors.items()
        }

    @property
    def nbytes(self) -> int:
        """Return the bytes of the file."""
        return len(self._memory)

    def weight(self, name: str) -> Weight:
        """Return the matrix `name`. Raises ValueError when its parts are not those of such a matrix."""
        entry = self._tensors[name]
        tensors = [self._tensor(part) for part in entry.parts]
        if entry.blocks is None:
            return DenseWeight(tensors[0])
        named = dict(zip(entry.present, tensors, strict=True))
        parts = named["q"], named["scale"], named.get("minimum")
        try:
            return BlockWeight(BlockTensor(*parts, *entry.blocks, entry.table, named.get("sub")))
        except ValueError as error:
            raise self._damaged(f"{name}: {error}") from error

    def vector(self, name: str) -> Tensor:
        """Return the vector `name`: pages of the file."""
        (part,) = self._tensors[name].parts
        return self._tensor(part)

    def byte_range(self, part: Tensor) -> ByteRange:
        """Return where `part`, a tensor of this file or some of its rows, lies in the file."""
        begin = part.data_ptr() - self._address
        return ByteRange(begin, begin + part.nbytes)

    def map_small_pages(self) -> None:
        """Let the pages of this file enter and leave the process one by one: in huge pages a part that leaves would
        take its neighbours along, which come back with it when they are read again."""
        self._advise(ByteRange(0, self.nbytes), "MADV_NOHUGEPAGE")

    def forget(self, where: ByteRange) -> None:
        """Take the whole pages of `where` out of this process: their next reader gets them from the system's cache of
        files, or from the disk. Nothing happens on Windows."""
        self._advise(where, "MADV_DONTNEED")

    def fetch(self, where: ByteRange) -> None:
        """Let the system read the pages of `where` while this process goes on; where it can."""
        self._advise(where, "MADV_WILLNEED")

    def _advise(self, where: ByteRange, advice: str) -> None:
        if not hasattr(mmap, advice):
            return
        first, last = -(-where.begin // mmap.PAGESIZE) * mmap.PAGESIZE, where.end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:  # whole pages, the others are the neighbours' too
            with suppress(OSError):  # a system without huge pages says so
                self._memory.madvise(getattr(mmap, advice), first, last - first)

    def verify(self, advance: Callable[[int], None] = lambda done: None, forget: bool = False) -> None:
        """Read the whole file and compare checksums. `advance(bytes)` is called after each part. `forget`: pages do not
        stay in this process.

        Raises ValueError when the file is damaged.
        """
        parts = [part for entry in self._tensors.values() for part in entry.parts]

        def matches(part: Part) -> tuple[bool, int]:
            tensor = self._tensor(part).view(-1).view(torch.uint8)
            raw, crc = _bytes(tensor), 0
            for start in range(0, len(raw), _CHUNK):
                crc = zlib.crc32(raw[start : start + _CHUNK], crc)
                if forget:
                    self.forget(self.byte_range(tensor[start : start + _CHUNK]))
            return crc == part.crc, len(raw)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for part, (right, size) in zip(parts, pool.map(matches, parts), strict=True):
                if not right:
                    raise self._damaged(f"the bytes at {part.at} were changed")
                advance(size)

    def _tensor(self, part: Part) -> Tensor:
        count = math.prod(part.shape)
        found: Tensor = torch.frombuffer(self._memory, dtype=part.dtype, count=count, offset=part.at)
        return found.view(part.shape)

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: damaged ({why}); delete it, and it is made again")


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    flat: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return flat
