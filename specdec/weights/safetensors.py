"""Safetensors as a checkpoint: one file, or a folder of shards with its index.

What: `SafetensorsCheckpoint` checks the headers of all shards at once, then maps a shard for each tensor that is asked
for. What other programs quantised (`specdec/weights/formats/`) has the names and shapes of the matrices that it stands
for. Why all headers first: a file that is missing, cut short or in a format that is not read is named in milliseconds,
not after minutes of loading. Left out: pickle files (reading one can run code). Source of the format:
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.kernels import BLOCK
from specdec.weights.checkpoint import Bytes, Checkpoint, StoredRows, check_request, checked_floats, exact_floats, find
from specdec.weights.checkpoint import offset_in_safetensors as offset_of
from specdec.weights.formats.experts import GatheredExperts, is_stack
from specdec.weights.formats.find import packed_matrices, refusal
from specdec.weights.formats.matrix import PackedMatrix, Stored
from specdec.weights.formats.settings import Settings
from specdec.weights.metadata import Values, naming, one_line, quote, read_object
from specdec.weights.tensors import QuantizedStorage, Storage, Weight, block_bytes, convert, is_on_lattice, stored_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAME = 255  # bytes of a file's name
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = ("I64", "I32", "BOOL")  # tables such as an assistant's token_ordering, never multiplied by
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
_MEASURED = 256  # rows on which the error of rounding is measured


@dataclass(frozen=True)
class _Entry:
    shard: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor in its file."""
        return math.prod(self.shape) * _BYTES.get(self.dtype.partition("_")[0], 1)


class SafetensorsCheckpoint:
    """Read the tensors of a safetensors file or folder (the methods are those of `checkpoint.Checkpoint`).

    Raises ValueError, naming the file and what to do, when a shard is missing, cut short or damaged, when the
    index and the shards disagree, when a name occurs twice, and for pickle files and formats that are not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._told = set[str]()
        self._lattices: dict[tuple[str, Storage], bool] = {}
        with naming(self._path):
            self._open()

    def _open(self) -> None:
        shards, indexed = _shards(self._path)
        self._entries: dict[str, _Entry] = {}
        for shard in shards:
            for name, entry in _header(shard).items():
                if name in self._entries:
                    raise ValueError(
                        f"{self.path}: tensor {name!r} is both in {self._entries[name].shard.name} and in "
                        f"{shard.name}; delete the files of the older download"
                    )
                self._entries[name] = entry
        lost = [f"{one_line(name)} ({shard.name})" for name, shard in indexed.items() if self._shard_of(name) != shard]
        if lost:
            raise ValueError(
                f"{self.path}: {INDEX} lists tensors that are not in their shard: {_some(lost)}; fetch the "
                "index and the shards again, from the same revision"
            )
        self._parts, self._matrices = self._entries, dict[str, PackedMatrix]()
        self._find_packed()

    def _find_packed(self) -> None:
        """Put the quantised matrices in the place of the tensors that they are stored as."""
        stored = {name: Stored(_flat(name, entry.shape), entry.dtype) for name, entry in self._parts.items()}
        settings = Settings(self._path)
        with ExitStack() as files:
            opened = cache(lambda shard: files.enter_context(safe_open(shard, framework="pt")))
            self._matrices, taken = packed_matrices(
                stored, settings, lambda name: opened(self._parts[name].shard).get_tensor(name)
            )
        self._entries = {name: entry for name, entry in self._parts.items() if name not in taken}
        if refused := refusal({name: stored[name] for name in self._entries}, settings):
            raise ValueError(f"{self._entries[refused[0]].shard}: {refused[1]}")

    def _shard_of(self, name: str) -> Path | None:
        entry = self._entries.get(name)
        return None if entry is None else entry.shard

    @property
    def path(self) -> Path:
        """Return the file or folder that the caller named."""
        return self._path

    @property
    def nbytes(self) -> int:
        """Return the bytes of all its files."""
        return sum(shard.stat().st_size for shard in {entry.shard for entry in self._parts.values()})

    @property
    def formats(self) -> list[tuple[PackedMatrix, int, int]]:
        """Return the formats of quantised matrices: one matrix of each, how many there are, and their bytes."""
        sizes, count = Counter[str](), Counter[str]()
        ones: dict[str, PackedMatrix] = {}
        for matrix in self._matrices.values():
            ones.setdefault(matrix.format, matrix)
            count[matrix.format] += 1
            sizes[matrix.format] += sum(self._parts[part].nbytes for part in matrix.parts.values())
        return [(ones[format], count[format], size) for format, size in sizes.most_common()]

    @property
    def trained(self) -> dict[str, int]:
        """Return the float matrices that were trained for 4 bits, each with its bytes; a few rows of each are read."""
        entries = self._entries.items()
        return {name: entry.nbytes for name, entry in entries if self._on_lattice(name, entry, "int4")}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape."""
        packed = {name: matrix.shape for name, matrix in self._matrices.items()}
        return {name: entry.shape for name, entry in self._entries.items()} | packed

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of what `weight` makes of a matrix, or `tensor` of a vector, in `dtype`."""
        if (matrix := self._matrices.get(name)) is not None:
            return matrix.loaded_bytes(dtype, quantize)
        entry = find(name, self._entries, self.path)
        if quantize in ("int4", "int8") and self._on_lattice(name, entry, quantize):
            return block_bytes(entry.shape, 4, False)
        return stored_bytes(entry.shape, quantize, dtype)

    def _on_lattice(self, name: str, entry: _Entry, quantize: QuantizedStorage) -> bool:
        """Return whether the tensor `name` is a matrix that was trained for 4 bits, by a few of its rows."""
        if len(entry.shape) < 2 or entry.shape[-1] % BLOCK or 0 in entry.shape or entry.dtype in _INTEGERS:
            return False
        if (name, quantize) not in self._lattices:
            with safe_open(entry.shard, framework="pt") as file:
                self._lattices[name, quantize] = is_on_lattice(file.get_tensor(name).flatten(0, -2), quantize)
        return self._lattices[name, quantize]

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32. Raises ValueError for integers that float32 cannot hold."""
        if name in self._matrices:
            return self.weight(name, torch.float32, "none").dequantize()
        entry = find(name, self._entries, self.path)
        with safe_open(entry.shard, framework="pt") as file:
            stored: Tensor = file.get_tensor(name)
        if entry.dtype in _INTEGERS:
            return exact_floats(stored, f"{entry.shard}: tensor {name!r} ({entry.dtype})")
        floats = stored.to(torch.float32, copy=True)  # a copy: the file may be replaced afterwards
        return checked_floats(floats, f"{entry.shard}: tensor {name!r}")

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`; of floats, `quantize` None and "none" both mean floats of `dtype` here."""
        if (matrix := self._matrices.get(name)) is not None:
            check_request(name, matrix.shape, quantize, rows)
            return self._packed(name, matrix, dtype, quantize, rows)
        entry = find(name, self._entries, self.path)
        check_request(name, entry.shape, quantize, rows)
        if entry.dtype in _INTEGERS:
            raise ValueError(f"{entry.shard}: {name!r} holds integers ({entry.dtype}); read it with tensor()")
        with safe_open(entry.shard, framework="pt") as file:
            stored: Tensor = file.get_tensor(name)  # pages of the file, not memory
            flat = stored.flatten(0, -2)  # of a tensor of experts, too
            return convert(flat, dtype, quantize, name=f"{entry.shard}: tensor {name!r}", rows=rows)

    def table(self, name: str) -> StoredRows:
        """Return the matrix `name` of floats, whose rows stay in the file."""
        entry = find(name, self._entries, self.path)
        check_request(name, entry.shape, None, None)
        dtype, (rows, columns) = _TORCH[entry.dtype], entry.shape
        offset = offset_of(entry.shard, name)

        def decode(raw: Bytes) -> Tensor:
            return torch.from_numpy(raw).view(dtype).float()

        return StoredRows(entry.shard, offset, (rows, columns), columns * dtype.itemsize, decode)

    def _packed(
        self, name: str, matrix: PackedMatrix, dtype: torch.dtype, quantize: Storage, rows: Tensor | None
    ) -> Weight:
        with naming(self.path), ExitStack() as files:
            opened = cache(lambda shard: files.enter_context(safe_open(shard, framework="pt")))
            parts = {part: opened(self._parts[full].shard).get_tensor(full) for part, full in matrix.parts.items()}
            parts = {part: tensor.reshape(_flat(matrix.parts[part], tensor.shape)) for part, tensor in parts.items()}
            weight = matrix.weight(parts, dtype, quantize, rows, f"{self.path}: tensor {name!r}")
            if matrix.is_changed and weight.packed is not None and rows is None and matrix.format not in self._told:
                self._told.add(matrix.format)
                count = min(_MEASURED, matrix.shape[0])
                theirs = matrix.floats(parts, slice(0, count))
                whole = float(theirs.square().sum())
                ours = weight.rows(torch.arange(count, dtype=torch.int64), torch.float32)
                if whole and (lost := float((ours - theirs).square().sum())):
                    self._tell(name, matrix, weight.nbytes, lost / whole)
        return weight

    def _tell(self, name: str, matrix: PackedMatrix, nbytes: int, error: float) -> None:
        """Warn that a matrix has other weights than in its format, with the error of its first rows."""
        size = matrix.shape[0] * matrix.shape[1]
        stored = sum(self._parts[part].nbytes for part in matrix.parts.values())
        warnings.warn(
            f"{self.path}: {matrix.format} takes {8 * nbytes / size:.1f} bits a weight in memory, and "
            f"{8 * stored / size:.1f} in the file; relative squared error {error:.1e}, measured on {one_line(name)}",
            stacklevel=3,
        )


def _flat(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a format reads a tensor: matrices of experts one below the other."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 and is_stack(name) else tuple(shape)


def safetensors_of(checkpoint: Checkpoint) -> SafetensorsCheckpoint | None:
    """Return the safetensors checkpoint that `checkpoint` is, or whose experts it gathers; None of another format."""
    inner = checkpoint.inner if isinstance(checkpoint, GatheredExperts) else checkpoint
    return inner if isinstance(inner, SafetensorsCheckpoint) else None


def _shards(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the files to read, and the file of each tensor by the index (empty without an index)."""
    if path.suffix in PICKLES:
        raise _pickle(path, [path.name])
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such file or folder")
    if (path / SINGLE).is_file():
        return [path / SINGLE], {}
    if (path / INDEX).is_file():
        indexed = _index(path / INDEX)
        return sorted(set(indexed.values())), indexed
    found = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(found) == 1:
        return found, {}
    if found:
        raise ValueError(f"{path}: {_some([f.name for f in found])} without {INDEX}; fetch the index too")
    names = sorted(file.name for file in path.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise _pickle(path, pickles)
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        raise ValueError(f"{path}: holds GGUF; name the file itself: {path / ggufs[0]}")
    raise ValueError(f"{path}: holds no .gguf file, no {SINGLE} and no {INDEX}; fetch the weights of the model")


def _index(file: Path) -> dict[str, Path]:
    with naming(file):
        names: dict[str, str] = Values(read_object(file)).mapping("weight_map")
        for shard in names.values():
            if not isinstance(shard, str):
                raise ValueError(f"damaged index: its weight_map names {quote(shard)}; delete it and fetch it again")
    strange = sorted({shard for shard in names.values() if not _beside(shard)})
    if strange:
        raise ValueError(f"{file}: its shards must lie beside it, but it names {_some(strange)}; fetch it again")
    missing = sorted({shard for shard in names.values() if not (file.parent / shard).is_file()})
    if missing:
        raise ValueError(f"{file}: names shards that are not there: {_some(missing)}; fetch them into {file.parent}")
    pickles = sorted({shard for shard in names.values() if shard.endswith(PICKLES)})
    if pickles or not names:
        raise _pickle(file, pickles) if pickles else ValueError(f"{file}: lists no tensors; fetch it again")
    return {name: file.parent / shard for name, shard in names.items()}


def _beside(shard: str) -> bool:
    """Return whether a name of an index is the name of a file in the same folder."""
    return Path(shard).name == shard and "\\" not in shard and shard.isprintable() and len(shard.encode()) <= _NAME


def _header(shard: Path) -> dict[str, _Entry]:
    """Return names, shapes and dtypes of one file. Raises ValueError when it is damaged."""
    try:
        with safe_open(shard, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            entries = {name: _Entry(shard, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        if _is_pointer(shard):
            raise ValueError(f"{shard}: a Git LFS pointer, not the weights; run `git lfs pull` there") from error
        raise ValueError(
            f"{shard}: damaged or incomplete safetensors file ({error}); delete it and fetch it again"
        ) from error
    return entries


def _is_pointer(shard: Path) -> bool:
    try:
        with shard.open("rb") as stream:
            return stream.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False


def _pickle(path: Path, names: list[str]) -> ValueError:
    return ValueError(
        f"{path}: weights only as pickle ({_some(names)}), which can run code when read; convert to "
        "safetensors: load the model with transformers, if you trust its source, and call "
        "model.save_pretrained(FOLDER)"
    )


def _some(names: list[str]) -> str:
    """Return up to eight names, for a message."""
    return ", ".join(one_line(name)[:_NAME] for name in names[:8]) + (
        f" and {len(names) - 8} more" if len(names) > 8 else ""
    )
