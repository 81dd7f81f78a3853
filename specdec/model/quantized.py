"""Quantised checkpoints kept on disk: minutes the first time, seconds from then on.

What: `load_or_quantize` opens the packed file of a checkpoint, and writes it first where there is none. Tensors are
read, quantised and written one at a time, so that this takes no more memory than a tensor. The weights are then mapped
from the packed file, the first time as well: there is one way in. A checkpoint that is written again takes its old
file's place, so that the disk holds one file for each folder and storage. Left out: deleting files of folders that are
gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from specdec.model.build import Quantize, Source, TensorReader, check_tensors, storage_of
from specdec.model.names import expected_tensors, flat_shape, is_matrix
from specdec.model.spec import DecoderSpec
from specdec.weights.hub.paths import cache_folder
from specdec.weights.packed import PackedFile, StaleError, packing
from specdec.weights.tensors import Weight, stored_bytes

FORMAT = 1  # of the packed files; another number makes all of them anew
LEAST = 1 << 30  # bytes of a checkpoint that is worth keeping quantised

Step = Callable[[str], None]
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what, total) -> a context whose value is told how much of the total was done."""


class PackedReader:
    """A `model.build.Reader` of a packed file, on `device`, vectors in `dtype`."""

    def __init__(self, file: PackedFile, dtype: torch.dtype, device: torch.device) -> None:
        self.file, self.dtype, self.device = file, dtype, device
        self._names = set(file.names)

    def matrix(self, name: str) -> Weight:
        """Return the matrix `name` as it was packed. Raises ValueError when the file is damaged."""
        return self.file.weight(name).to(self.device)

    def vector(self, name: str) -> Tensor | None:
        """Return a norm, bias or scalar in the reader's dtype; None when the file has none of this name."""
        return self.file.vector(name).to(self.device, self.dtype) if name in self._names else None


def load_or_quantize(
    folder: Path,
    spec: DecoderSpec,
    source: Source,
    quantize: Quantize,
    dtype: torch.dtype,
    bar: Bar,
) -> PackedFile | None:
    """Return the packed form of the safetensors checkpoint in `folder`, made now where there is none, and checked.

    None where it cannot be kept (too little room on the disk, a folder that cannot be written); a warning says so. Safe
    against other processes: one makes the file, the others wait. Raises ValueError when the checkpoint does not fit
    `spec`.
    """
    check_tensors(spec, source)
    files = sorted(folder.glob("*.safetensors"))
    made_from = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    # The config says which tensors of the files are a model's, and what is added to a norm.
    tensors = _digest([sorted(expected_tensors(spec).items()), source.norm_offset])
    kind = {"format": FORMAT, "quantize": quantize, "dtype": str(dtype)}
    about = {**kind, "from": made_from, "tensors": tensors}
    where = "the cache folder"
    try:
        name = f"{folder.name}-{quantize}-{_digest([str(folder.resolve()), kind])}.packed"
        path = cache_folder() / "quantized" / name
        where = str(path.parent)
        # Without a lock: in a folder that can only be read none can be taken.
        with contextlib.suppress(ValueError):
            if path.is_file():
                return open_packed(path, about, spec, bar)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            return _opened(path, about, spec, bar) or _made(path, about, spec, source, quantize, dtype, bar)
    except OSError as error:
        warnings.warn(
            f"the quantised model cannot be kept in {where} ({error}): every start will quantise it", stacklevel=2
        )
        return None


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def open_packed(path: Path, about: dict[str, Any], spec: DecoderSpec, bar: Bar) -> PackedFile:
    """Return the packed file `path` of a model, once it is known to be whole and to hold what `spec` needs.

    Raises ValueError when it is damaged, StaleError when it was made from something else than `about`.
    """
    file = PackedFile(path, about)
    if file.shapes() != {name: flat_shape(name, shape) for name, shape in expected_tensors(spec).items()}:
        raise ValueError(f"{path}: damaged (it lists other tensors than the model); delete it, and it is made again")
    with bar(f"checking {path.name}", file.nbytes) as advance:
        file.verify(advance)
    return file


def _opened(path: Path, about: dict[str, Any], spec: DecoderSpec, bar: Bar) -> PackedFile | None:
    """Return the file if it is there, whole and of this model; delete another one, if it is damaged with a warning."""
    if not path.is_file():
        return None
    try:
        return open_packed(path, about, spec, bar)
    except ValueError as error:
        if not isinstance(error, StaleError):
            warnings.warn(str(error), stacklevel=2)
        path.unlink(missing_ok=True)
        return None


def _made(
    path: Path,
    about: dict[str, Any],
    spec: DecoderSpec,
    source: Source,
    quantize: Quantize,
    dtype: torch.dtype,
    bar: Bar,
) -> PackedFile:
    """Write the packed file and open it. Raises OSError when it cannot be written."""
    for left in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        left.unlink()
    shapes = expected_tensors(spec)
    needed = sum(stored_bytes(shape, storage_of(name, quantize), torch.float32) for name, shape in shapes.items())
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    with bar(f"quantising {path.name}", len(shapes)) as advance, packing(path, about) as writer:
        read = TensorReader(spec, source, dtype, torch.device("cpu"), quantize, lambda _: advance(1))
        for name, shape in shapes.items():
            if is_matrix(name, shape):
                writer.weight(name, read.stored(name))
            else:
                vector = read.vector(name)
                assert vector is not None
                writer.vector(name, vector.float())
    return PackedFile(path, about)
