"""The experts of a mixture, which programs store in several ways, as transformers has them: two tensors a layer.

What: `GatheredExperts` gives gate and up of all experts as one tensor [E, 2 * width, hidden], each expert's gate before
its up, and down as one [E, hidden, width], of a file that has

- one tensor for gate and one for up (`ffn_gate_exps`, `ffn_up_exps`: Ollama's converter, whose name for the scales of
  the experts is another one, too);
- one tensor for each of the three (`experts.switch_glu.gate_proj`: MLX);
- a matrix for each expert (`experts.7.gate_proj`: compressed-tensors and others that quantise linear layers).

Left out: experts that are stored in different types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import GROUP, BlockTensor
from specdec.weights.checkpoint import Checkpoint
from specdec.weights.metadata import one_line
from specdec.weights.tensors import BlockWeight, DenseWeight, Storage, Weight, block_bytes, convert, stored_bytes

_SCALE = re.compile(r"^(blk\.\d+\.)ffn_gate_inp\.per_expert_scale$")
_PAIR = re.compile(r"^(blk\.\d+\.)ffn_gate_exps\.weight$")
_STACK = re.compile(r"^(.*\.experts\.)switch_glu\.(gate|up|down)_proj\.(weight|scales|biases)$")
_ONE = re.compile(r"^(.*\.experts\.)(\d{1,6})\.(gate|up|down)_proj\.weight$")
_Sources = tuple[tuple[str, ...], ...]
"""The names of what a tensor is made of: for gate and for up (or for down alone) one tensor of all experts, or a matrix
of each."""


def is_stack(name: str) -> bool:
    """Tell whether the tensor `name` is one of MLX's three dimensions: a matrix of every expert, or a part of it."""
    return _STACK.match(name) is not None


def with_gathered_experts(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """Return `checkpoint`, or a `GatheredExperts` of it where it stores its `count` experts in another way."""
    gathered = GatheredExperts(checkpoint, count) if count else None
    return checkpoint if gathered is None or not gathered.changes else gathered


class GatheredExperts:
    """Give the experts of `inner` as two tensors a layer, and its other tensors as they are."""

    def __init__(self, inner: Checkpoint, count: int) -> None:
        """Find the tensors of the `count` experts in `inner`. Incomplete experts, and those whose matrices have several
        shapes, are left as they are: the loader then refuses the file, with the names that are missing and surplus."""
        self.inner, shapes = inner, inner.shapes()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._sources: dict[str, _Sources] = {}
        for name, sources in _find_sources(shapes, count):
            distinct = {shapes.get(part, ()) for parts in sources for part in parts}
            shape, whole = next(iter(distinct)), len(sources[0]) == 1
            if len(distinct) > 1 or name in shapes or len(shape) not in ((2, 3) if whole else (2,)):
                continue
            if len(shape) == 2:  # a matrix for each, or all of them one below the other
                shape = (count, shape[0] // (count if whole else 1), shape[1])
            self._sources[name] = sources
            self._shapes[name] = (shape[0], len(sources) * shape[1], shape[2])
        self._stored_names = {
            f"{match[1]}ffn_down_exps.scale": name
            for name in shapes
            if (match := _SCALE.match(name)) and f"{match[1]}ffn_down_exps.scale" not in shapes
        }

    @property
    def changes(self) -> bool:
        """Return whether `inner` has other tensors than this checkpoint."""
        return bool(self._sources or self._stored_names)

    @property
    def path(self) -> Path:
        """Return the file or folder."""
        return self.inner.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape."""
        used = {part for sources in self._sources.values() for parts in sources for part in parts}
        names = {stored: name for name, stored in self._stored_names.items()}
        others = {names.get(name, name): shape for name, shape in self.inner.shapes().items() if name not in used}
        return others | self._shapes

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of the tensor, as the inner checkpoint counts them."""
        if name not in self._sources:
            return self.inner.loaded_bytes(self._stored_names.get(name, name), dtype, quantize)
        whole, lattice = self._bytes(name, dtype, quantize), block_bytes(self._shapes[name], 4, False)
        if quantize in ("int4", "int8") and whole != lattice and self._in_floats(name):
            return stored_bytes(self._shapes[name], quantize, dtype)  # also where some were trained for 4 bits
        return whole

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32."""
        return self.inner.tensor(self._stored_names.get(name, name))

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`: that of `inner`, or the matrices of all experts one below the other, each expert's
        rows of gate before those of up.

        Raises ValueError when experts become blocks of different kinds.
        """
        if name not in self._sources:
            return self.inner.weight(name, dtype, quantize, rows)
        assert rows is None, "experts are read whole"
        found = self._joined(name, dtype, quantize)
        if found is None and quantize in ("int4", "int8") and self._in_floats(name):
            # Some were trained for 4 bits and others not: they take what one tensor of all of them takes.
            floats = self._joined(name, torch.float32, "none")
            assert isinstance(floats, DenseWeight)
            return convert(floats.tensor, dtype, quantize, name=f"{self.path}: tensor {name!r}")
        if found is None:
            raise ValueError(
                f"{self.path}: {' and '.join(one_line(parts[0]) for parts in self._sources[name])}, or those of other "
                "experts, are stored in different types, which is not supported; choose a file that stores all experts "
                "in one"
            )
        return found

    def _joined(self, name: str, dtype: torch.dtype, quantize: Storage) -> Weight | None:
        """Return the matrix of all experts; None where their matrices are of several kinds."""
        sources = self._sources[name]
        columns = [_concatenate([self.inner.weight(part, dtype, quantize) for part in parts]) for parts in sources]
        return _interleave(columns, self._shapes[name][0])

    def _in_floats(self, name: str) -> bool:
        """Return whether the file has floats for all experts of `name`."""
        return self._bytes(name, torch.float32, None) == 4 * math.prod(self._shapes[name])

    def _bytes(self, name: str, dtype: torch.dtype, quantize: Storage) -> int:
        """Return the bytes of all matrices of the experts of `name`, each for itself."""
        return sum(self.inner.loaded_bytes(part, dtype, quantize) for parts in self._sources[name] for part in parts)


def _find_sources(shapes: Mapping[str, tuple[int, ...]], count: int) -> Iterator[tuple[str, _Sources]]:
    """Yield the name of each tensor that can be made of those in `shapes`, and what it is made of."""
    ones: dict[str, dict[str, dict[int, str]]] = {}
    for name, shape in shapes.items():
        if (match := _PAIR.match(name)) and len(shape) == 3:
            yield f"{match[1]}ffn_gate_up_exps.weight", ((name,), (f"{match[1]}ffn_up_exps.weight",))
        elif (
            (match := _STACK.match(name))
            and match[3] == "weight"
            and match[2] != "up"
            and shape
            and not shape[0] % count
        ):
            pair = ((name,), (f"{match[1]}switch_glu.up_proj.weight",))
            yield (f"{match[1]}gate_up_proj", pair) if match[2] == "gate" else (f"{match[1]}down_proj", pair[:1])
        elif match := _ONE.match(name):
            ones.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = name
    for prefix, kinds in ones.items():
        complete = {kind: names for kind, names in kinds.items() if len(names) == count}
        # "" where the numbers are others than 0 .. count - 1: it has no shape, so that the caller leaves them
        all_of = {kind: tuple(names.get(i, "") for i in range(count)) for kind, names in complete.items()}
        if "gate" in all_of and "up" in all_of:
            yield f"{prefix}gate_up_proj", (all_of["gate"], all_of["up"])
        if "down" in all_of:
            yield f"{prefix}down_proj", (all_of["down"],)


def _concatenate(weights: Sequence[Weight]) -> Weight | None:
    """Return matrices of one kind one below the other; None where they are of several kinds."""
    if len(weights) == 1:
        return weights[0]
    dense = [weight.tensor for weight in weights if isinstance(weight, DenseWeight)]
    if len(dense) == len(weights):
        return DenseWeight(torch.cat(dense))
    blocks = _blocks_of_one_kind(weights)
    if blocks is None or blocks[0].rows % GROUP:  # a group of the layout would hold rows of two experts
        return None
    parts: dict[str, Any] = {
        part: torch.cat([getattr(each, part) for each in blocks]) for part in _tensor_names(blocks[0])
    }
    return BlockWeight(replace(blocks[0], rows=len(blocks) * blocks[0].rows, **parts))


def _interleave(columns: Sequence[Weight | None], count: int) -> Weight | None:
    """Return the rows of `columns` expert by expert: of each of the `count` experts those of the first column, then
    those of the next. None where the columns are of several kinds, or one of them is None."""
    weights = [column for column in columns if column is not None]
    if len(weights) < len(columns) or len(columns) == 1:
        return columns[0] if len(columns) == 1 else None

    def interleave(parts: Sequence[Tensor]) -> Tensor:
        experts = [part.view(count, -1, *part.shape[1:]) for part in parts]  # [E, rows or groups of an expert, ...]
        return torch.stack(experts, dim=1).flatten(0, 2)  # [E * columns * rows or groups of an expert, ...]

    dense = [weight.tensor for weight in weights if isinstance(weight, DenseWeight)]
    if len(dense) == len(weights):
        return DenseWeight(interleave(dense))
    blocks = _blocks_of_one_kind(weights)
    if blocks is None or blocks[0].rows // count % GROUP:
        return None
    made: dict[str, Any] = {
        part: interleave([getattr(each, part) for each in blocks]) for part in _tensor_names(blocks[0])
    }
    return BlockWeight(replace(blocks[0], rows=len(blocks) * blocks[0].rows, **made))


def _blocks_of_one_kind(weights: Sequence[Weight]) -> list[BlockTensor] | None:
    """Return the blocks of `weights`; None where these are of several kinds, or in no blocks."""
    blocks = [weight.packed for weight in weights if weight.packed is not None]
    return blocks if len(blocks) == len(weights) and len(set(map(_kind, blocks))) == 1 else None


def _tensor_names(blocks: BlockTensor) -> list[str]:
    return [field.name for field in fields(blocks) if isinstance(getattr(blocks, field.name), Tensor)]


def _kind(blocks: BlockTensor) -> tuple[Any, ...]:
    return blocks.bits, blocks.table, blocks.columns, blocks.rows, *_tensor_names(blocks)
