"""The file that llama.cpp keeps beside a multimodal model: the embedder of a Gemma 4 "unified" model.

What: `MmprojCheckpoint` shows such a file under the names and in the layout of the published safetensors, so that one
loader reads both; `mmproj_for` picks the file of a model. A file is known by its `general.architecture` and its
projector types, never by its name. Where the layouts differ: llama.cpp's patches are planar (all red pixels, then all
green ones), ours and transformers' have the channels of a pixel together, so the inputs of the patch matrix and of its
norm stand in another order; and its table of positions is one of x, then one of y. Floats keep their type where it is
smaller than the model's. Blocks are kept, but for a patch matrix in blocks: its inputs leave their blocks, so it is
quantised again, to 8 bits. Left out: encoders with layers of their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.weights.checkpoint import check_request, find
from specdec.weights.gguf.checkpoint import GGUFCheckpoint
from specdec.weights.gguf.header import read_header
from specdec.weights.metadata import Values
from specdec.weights.tensors import Storage, Weight, convert, stored_bytes

ARCHITECTURE = "clip"
CHANNELS = 3
PROJECTORS = {"vision": "gemma4uv", "audio": "gemma4ua"}  # by part: the types that are read here
_PATCHES, _POSITIONS = "vision_embedder.patch_dense.weight", "vision_embedder.pos_embedding"
NAMES = {
    "vision_embedder.patch_ln1.weight": "v.patch_norm.1.weight",
    "vision_embedder.patch_ln1.bias": "v.patch_norm.1.bias",
    _PATCHES: "v.patch_embd.weight",
    "vision_embedder.patch_dense.bias": "v.patch_embd.bias",
    "vision_embedder.patch_ln2.weight": "v.patch_norm.2.weight",
    "vision_embedder.patch_ln2.bias": "v.patch_norm.2.bias",
    _POSITIONS: "v.position_embd.weight",
    "vision_embedder.pos_norm.weight": "v.patch_norm.3.weight",
    "vision_embedder.pos_norm.bias": "v.patch_norm.3.bias",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
}
"""The name in such a file of each tensor, by canonical name."""
_PLANAR = (_PATCHES, "vision_embedder.patch_ln1.weight", "vision_embedder.patch_ln1.bias")


def mmproj_for(files: Iterable[Path], hidden: int) -> MmprojCheckpoint | None:
    """Return, of the embedders `files` that lie beside a model, the one for rows of `hidden` numbers; None: there is
    none.

    Of several, the largest file is taken: its values are the most exact. Raises ValueError when a file is damaged.
    """
    ours = [path for path in files if _parts(read_header(path).metadata)]
    found = [MmprojCheckpoint(path) for path in sorted(ours, key=lambda path: -path.stat().st_size)]
    return next((file for file in found if file.hidden == hidden), None)


def _parts(metadata: Mapping[str, Any]) -> list[str]:
    """Return which of "vision" and "audio" a file embeds in the way that is read here."""
    values = Values(metadata, f"{ARCHITECTURE}.")
    shared = values.text("projector_type", default="")
    return [
        part
        for part, kind in PROJECTORS.items()
        if values.flag(f"has_{part}_encoder", default=False)
        and values.text(f"{part}.projector_type", default=shared) == kind
    ]


class MmprojCheckpoint:
    """Read the tensors of an mmproj file by their canonical names (the methods are those of `checkpoint.Checkpoint`).

    A file of another kind of encoder has none. Raises ValueError when the file is damaged, or has types of blocks that
    are not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GGUFCheckpoint(path)
        parts = _parts(self.metadata)
        self._stored = {
            name: stored
            for name, stored in NAMES.items()
            if stored in self._file.header.tensors and ("audio" if "audio" in name else "vision") in parts
        }

    @property
    def path(self) -> Path:
        """Return the file."""
        return self._file.path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Return the metadata of the file."""
        return self._file.header.metadata

    @property
    def hidden(self) -> int | None:
        """Return the numbers in a row that the file's projections make; None where it has none of ours."""
        shapes = self.shapes()
        ends = [shape for name, shape in shapes.items() if name.endswith("embedding_projection.weight")]
        return ends[0][0] if ends and len(ends[0]) == 2 else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's canonical name, and its shape in the published layout."""
        stored = self._file.shapes()
        shapes = {name: stored[theirs] for name, theirs in self._stored.items()}
        if len(table := shapes.get(_POSITIONS, ())) == 3:
            shapes[_POSITIONS] = (table[1], table[0], table[2])
        return shapes

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of a matrix that `weight` makes, or of a vector that `tensor` makes, in
        `dtype`."""
        stored = find(name, self._stored, self.path)
        shape = self.shapes()[name]
        if len(shape) == 2 and name in _PLANAR:
            return stored_bytes(shape, self._planar_storage(name, quantize), self._kept(name, dtype, quantize))
        return self._file.loaded_bytes(
            stored, self._kept(name, dtype, quantize) if len(shape) == 2 else dtype, quantize
        )

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32, in the published layout."""
        tensor = self._file.tensor(find(name, self._stored, self.path))
        if name in _PLANAR:
            return tensor[..., self._order(name)]
        return tensor.transpose(0, 1).contiguous() if name == _POSITIONS else tensor

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name` in the published layout; see the module's docstring for how it is kept."""
        stored = find(name, self._stored, self.path)
        check_request(name, self.shapes()[name], quantize, rows)
        kept = self._kept(name, dtype, quantize)
        if name not in _PLANAR:
            return self._file.weight(stored, kept, quantize, rows)
        label = f"{self.path}: tensor {stored!r}"
        return convert(self.tensor(name), kept, self._planar_storage(name, quantize), name=label, rows=rows)

    def _planar_storage(self, name: str, quantize: Storage) -> Storage:
        """Return the storage of the patch matrix: blocks of any kind become blocks of 8 bits."""
        return "int8" if quantize is None and self._file.float_type(self._stored[name]) is None else quantize

    def _kept(self, name: str, dtype: torch.dtype, quantize: Storage) -> torch.dtype:
        """Return the type of a matrix of floats: the smaller one of the file's and `dtype`, unless another is asked
        for."""
        own = self._file.float_type(self._stored[name])
        return own if quantize is None and own is not None and own.itemsize < dtype.itemsize else dtype

    def _order(self, name: str) -> Tensor:
        """Return, for each input in our order, its place in the file's order."""
        columns = self.shapes()[name][-1]
        side = math.isqrt(columns // CHANNELS)
        if side * side * CHANNELS != columns:
            raise ValueError(
                f"{self.path}: {columns} inputs are no square patch of {CHANNELS} channels; fetch it again"
            )
        planar = torch.arange(columns, dtype=torch.int64).view(CHANNELS, side, side)
        return planar.permute(1, 2, 0).reshape(-1)  # [C, row, column] -> [row, column, C], flat
