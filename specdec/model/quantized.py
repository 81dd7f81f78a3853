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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from specdec.model.build import Quantize, Source, TensorReader, check_tensors, storage_of
from specdec.model.experts import ExpertPages
from specdec.model.names import expected_tensors, flat_shape, is_expert_matrix, is_matrix
from specdec.model.spec import DecoderSpec
from specdec.weights.checkpoint import RowSource
from specdec.weights.gguf.split import part_names
from specdec.weights.hub.paths import cache_folder
from specdec.weights.packed import PackedFile, StaleError, packing
from specdec.weights.safetensors import safetensors_of
from specdec.weights.tensors import Weight

FORMAT = 1  # of the packed files; another number makes all of them anew
FIT = 2  # of floats to blocks; another number makes a file anew, in the place of the old one
LEAST = 1 << 30  # bytes of a checkpoint that is worth keeping quantised

Step = Callable[[str], None]
Shapes = Mapping[str, tuple[int, ...]]
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what, total) -> a context whose value is told how much of the total was done."""


class PackedReader:
    """Read the tensors of a packed file as a `model.build.Reader`, on `device`, vectors in `dtype`."""

    def __init__(
        self,
        file: PackedFile,
        dtype: torch.dtype,
        device: torch.device,
        source: Source | None = None,
        experts_limit: int | None = None,
    ) -> None:
        """Read from `file`, and from `source`, of which it was made, the table that stays there. Experts take at most
        `experts_limit` bytes of memory; None: as many as they have."""
        self.file, self.dtype, self.device = file, dtype, device
        mapped = experts_limit is not None and device.type == "cpu"
        self.pages = ExpertPages(file, experts_limit or 0) if mapped else None
        self._names, self._source = set(file.names), source

    def matrix(self, name: str) -> Weight:
        """Return the matrix `name` as it was packed. Raises ValueError when the file is damaged."""
        return self.file.weight(name).to(self.device)

    def table(self, name: str) -> Weight:
        """Return a matrix whose rows stay in the checkpoint, or else the matrix as it was packed."""
        if name in self._names:
            return self.matrix(name)
        assert self._source is not None and isinstance(self._source.checkpoint, RowSource)
        return self._source.checkpoint.table(self._source.names[name])

    def vector(self, name: str) -> Tensor | None:
        """Return a norm, bias or scalar in the reader's dtype; None when the file has none of this name."""
        return self.file.vector(name).to(self.device, self.dtype) if name in self._names else None


def load_or_quantize(
    model: Path,
    spec: DecoderSpec,
    source: Source,
    quantize: Quantize,
    dtype: torch.dtype,
    bar: Bar,
    experts_alone: bool = False,
) -> PackedFile | None:
    """Return the packed form of the checkpoint at `model`, made now where there is none, and checked: of a folder of
    safetensors or a .gguf file, all of its tensors or the matrices of `experts_alone`.

    None where it cannot be kept (too little room on the disk, a folder that cannot be written); a warning says so. Safe
    against other processes: one makes the file, the others wait. Raises ValueError when the checkpoint does not fit
    `spec`.
    """
    check_tensors(spec, source)
    wanted = {n: shape for n, shape in expected_tensors(spec).items() if not source.stays_in_file(n)}
    shapes = {n: shape for n, shape in wanted.items() if is_expert_matrix(n) or not experts_alone}
    files = sorted(model.glob("*.safetensors"))
    if model.is_file():
        files = [model.with_name(name) for name in part_names(model.name)] or [model]
    made_from = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    # The config says which tensors of the files are a model's, and what is added to a norm.
    tensors = _digest([sorted(shapes.items()), source.norm_offset])
    kind = {"format": FORMAT, "quantize": quantize, "dtype": str(dtype)}
    about: dict[str, Any] = {**kind, "from": made_from, "tensors": tensors, "fit": FIT}
    if (folder := safetensors_of(source.checkpoint)) is not None and (formats := folder.formats):
        about["formats"] = sorted(f"{matrix.format}: {matrix.becomes}" for matrix, *_ in formats)
    where = "the cache folder"
    try:
        word = "experts" if experts_alone else quantize or "stored"
        name = f"{model.name}-{word}-{_digest([str(model.resolve()), kind, experts_alone])}.packed"
        path = cache_folder() / "quantized" / name
        where = str(path.parent)
        # Without a lock: in a folder that can only be read none can be taken.
        with contextlib.suppress(ValueError):
            if path.is_file():
                return open_packed(path, about, shapes, bar)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = _opened(path, about, shapes, bar)
            return found or _made(path, about, spec, shapes, source, quantize, dtype, bar)
    except OSError as error:
        warnings.warn(
            f"the quantised model cannot be kept in {where} ({error}): every start will quantise it", stacklevel=2
        )
        return None


def expert_pages(
    model: Path,
    spec: DecoderSpec,
    source: Source,
    quantize: Quantize,
    dtype: torch.dtype,
    device: torch.device,
    bar: Bar,
    limit: int | None,
) -> ExpertPages | None:
    """Return the experts of the .gguf file `model` as pages of a packed file, `limit` bytes of them in memory.

    None without a limit, off the CPU, for a folder, and where the file cannot be kept, as in `load_or_quantize`.
    """
    if limit is None or device.type != "cpu" or not model.is_file():
        return None
    packed = load_or_quantize(model, spec, source, quantize, dtype, bar, experts_alone=True)
    return None if packed is None else ExpertPages(packed, limit)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def open_packed(path: Path, about: dict[str, Any], shapes: Shapes, bar: Bar) -> PackedFile:
    """Return the packed file `path` of a model, once it is known to be whole and to hold tensors of `shapes`.

    Raises ValueError when it is damaged, StaleError when it was made from something else than `about`.
    """
    file = PackedFile(path, about)
    if file.shapes() != {name: flat_shape(name, shape) for name, shape in shapes.items()}:
        raise ValueError(f"{path}: damaged (it lists other tensors than the model); delete it, and it is made again")
    with bar(f"checking {path.name}", file.nbytes) as advance:
        file.verify(advance, forget=any(map(is_expert_matrix, shapes)))
    return file


def _opened(path: Path, about: dict[str, Any], shapes: Shapes, bar: Bar) -> PackedFile | None:
    """Return the file if it is there, whole and of this model; delete another one, if it is damaged with a warning."""
    if not path.is_file():
        return None
    try:
        return open_packed(path, about, shapes, bar)
    except ValueError as error:
        if not isinstance(error, StaleError):
            warnings.warn(str(error), stacklevel=2)
        path.unlink(missing_ok=True)
        return None


def _made(
    path: Path,
    about: dict[str, Any],
    spec: DecoderSpec,
    shapes: Shapes,
    source: Source,
    quantize: Quantize,
    dtype: torch.dtype,
    bar: Bar,
) -> PackedFile:
    """Write the packed file and open it. Raises OSError when it cannot be written."""
    for left in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        left.unlink()
    checkpoint, names = source.checkpoint, source.names
    needed = sum(checkpoint.loaded_bytes(names[n], torch.float32, storage_of(n, quantize)) for n in shapes)
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
