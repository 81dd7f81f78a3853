"""Safetensors as a checkpoint: one file, or a folder of shards with its index.

What: `SafetensorsCheckpoint` checks the headers of all shards at once, then maps a shard for each tensor that is asked
for. Why all headers first: a missing, cut-short or pre-quantised file is named in milliseconds, not after minutes of
loading. Left out: pickle files (reading one can run code) and pre-quantised checkpoints (GPTQ, AWQ, bitsandbytes,
float8), which have other layouts. Source of the format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.weights.checkpoint import Bytes, StoredRows, check_request, checked_floats, exact_floats, find
from specdec.weights.metadata import Values, naming, one_line, quote, read_object
from specdec.weights.tensors import Storage, Weight, convert, stored_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAME = 255  # bytes of a file's name
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = ("I64", "I32", "BOOL")  # tables such as an assistant's token_ordering, never multiplied by
_PREQUANTISED = (  # last parts of names that quantising libraries add
    "qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "quant_map",
    "SCB",
)  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    shard: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsCheckpoint:
    """The tensors of a safetensors file or folder (the methods are those of `checkpoint.Checkpoint`).

    Raises ValueError, naming the file and what to do, when a shard is missing, cut short or damaged, when the
    index and the shards disagree, when a name occurs twice, and for pickle and pre-quantised checkpoints.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
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
        return sum(shard.stat().st_size for shard in {entry.shard for entry in self._entries.values()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of a matrix that `weight` makes, or of a vector that `tensor` makes, in
        `dtype`."""
        return stored_bytes(find(name, self._entries, self.path).shape, quantize, dtype)

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32. Raises ValueError for integers that float32 cannot hold."""
        entry = find(name, self._entries, self.path)
        with safe_open(entry.shard, framework="pt") as file:
            stored: Tensor = file.get_tensor(name)
        if entry.dtype in _INTEGERS:
            return exact_floats(stored, f"{entry.shard}: tensor {name!r} ({entry.dtype})")
        floats = stored.to(torch.float32, copy=True)  # a copy: the file may be replaced afterwards
        return checked_floats(floats, f"{entry.shard}: tensor {name!r}")

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`; `quantize` None and "none" both mean floats of `dtype` here."""
        entry = find(name, self._entries, self.path)
        check_request(name, entry.shape, quantize, rows)
        if entry.dtype in _INTEGERS:
            raise ValueError(f"{entry.shard}: {name!r} holds integers ({entry.dtype}); read it with tensor()")
        with safe_open(entry.shard, framework="pt") as file:
            stored: Tensor = file.get_tensor(name)  # pages of the file, not memory
            matrix = stored.flatten(0, -2)  # of a tensor of experts, too
            return convert(matrix, dtype, quantize, name=f"{entry.shard}: tensor {name!r}", rows=rows)

    def table(self, name: str) -> StoredRows:
        """Return the matrix `name` of floats, whose rows stay in the file."""
        entry = find(name, self._entries, self.path)
        check_request(name, entry.shape, None, None)
        dtype, (rows, columns) = _TORCH[entry.dtype], entry.shape
        offset = _offset(entry.shard, name)

        def decode(raw: Bytes) -> Tensor:
            return torch.from_numpy(raw).view(dtype).float()

        return StoredRows(entry.shard, offset, (rows, columns), columns * dtype.itemsize, decode)


def _offset(shard: Path, name: str) -> int:
    """Return the byte of a file at which the tensor `name` begins: the file has been opened before, and is whole."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin: int = json.loads(file.read(length))[name]["data_offsets"][0]
    return 8 + length + begin


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
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    if found:
        raise ValueError(f"{path}: {_some([f.name for f in found])} without {INDEX}; fetch the index too")
    names = sorted(file.name for file in path.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise _pickle(path, pickles)
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        raise ValueError(f"{path}: holds GGUF; name the file itself: {path / ggufs[0]}")
    raise ValueError(f"{path}: holds neither {SINGLE} nor {INDEX}; fetch the weights of the model")


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
    """Return names, shapes and dtypes of one file. Raises ValueError when it is damaged or holds types that we do not
    read."""
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
    for name, entry in entries.items():
        packed = name.rpartition(".")[2] in _PREQUANTISED or ".quant_state." in name
        if packed or entry.dtype not in (*_FLOATS, *_INTEGERS):
            raise _unreadable(shard, name, entry.dtype)
    return entries


def _is_pointer(shard: Path) -> bool:
    try:
        with shard.open("rb") as stream:
            return stream.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False


def _unreadable(shard: Path, name: str, dtype: str) -> ValueError:
    return ValueError(
        f"{shard}: tensor {name!r} ({dtype}) cannot be read, only {', '.join(_FLOATS)} can. Checkpoints that "
        "are quantised already (GPTQ, AWQ, bitsandbytes, float8) have other layouts: name the 16-bit "
        "checkpoint of this model and load it with quantize='int4', or name a GGUF file"
    )


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
