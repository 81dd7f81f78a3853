"""The experts of a mixture, which programs store in several ways, as transformers has them: two tensors a layer.

What: `GatheredExperts` gives gate and up of all experts as one tensor [E, 2 * width, hidden], each expert's gate before
its up, and down as one [E, hidden, width], where they lie as

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
_Columns = tuple[tuple[str, ...], ...]
"""What a tensor is made of: those that lie beside each other in an expert, each of tensors that are stacked."""


def is_stack(name: str) -> bool:
    """Tell whether the tensor `name` is (a part of) a matrix of every expert, which MLX stores in three dimensions."""
    return _STACK.match(name) is not None


def with_gathered_experts(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """Return `checkpoint`, or a `GatheredExperts` of it where its `count` experts lie in another way."""
    found = GatheredExperts(checkpoint, count)
    return found if found.changes else checkpoint


class GatheredExperts:
    """Hold a checkpoint in which the experts of `inner` are two tensors a layer."""

    def __init__(self, inner: Checkpoint, count: int) -> None:
        """Find the tensors of the `count` experts in `inner`. What is not whole, or of several shapes, is left as it
        is: the model then lacks a tensor, and has some too many."""
        self.inner, shapes = inner, inner.shapes()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._made: dict[str, _Columns] = {}
        for name, columns in _found(shapes, count):
            kinds = {shapes.get(part, ()) for column in columns for part in column}
            shape, whole = kinds.pop(), len(columns[0]) == 1
            if kinds or name in shapes or len(shape) not in ((2, 3) if whole else (2,)):
                continue
            if len(shape) == 2:  # a matrix for each, or all of them one below the other
                shape = (count, shape[0] // (count if whole else 1), shape[1])
            self._made[name] = columns
            self._shapes[name] = (shape[0], len(columns) * shape[1], shape[2])
        self._renamed = {
            f"{found[1]}ffn_down_exps.scale": name
            for name in shapes
            if (found := _SCALE.match(name)) and f"{found[1]}ffn_down_exps.scale" not in shapes
        }

    @property
    def changes(self) -> bool:
        """Return whether anything lies in another way than here."""
        return bool(self._made or self._renamed)

    @property
    def path(self) -> Path:
        """Return the file or folder."""
        return self.inner.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape."""
        parts = {part for columns in self._made.values() for column in columns for part in column}
        names = {stored: name for name, stored in self._renamed.items()}
        left = {names.get(name, name): shape for name, shape in self.inner.shapes().items() if name not in parts}
        return left | self._shapes

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of the tensor, as the inner checkpoint counts them."""
        if name not in self._made:
            return self.inner.loaded_bytes(self._renamed.get(name, name), dtype, quantize)
        whole, lattice = self._bytes(name, dtype, quantize), block_bytes(self._shapes[name], 4, False)
        if quantize in ("int4", "int8") and whole != lattice and self._in_floats(name):
            return stored_bytes(self._shapes[name], quantize, dtype)  # also where some were trained for 4 bits
        return whole

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32."""
        return self.inner.tensor(self._renamed.get(name, name))

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`; of experts each one's rows of gate, then those of up.

        Raises ValueError when experts become blocks of different kinds.
        """
        if name not in self._made:
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
                f"{self.path}: {' and '.join(one_line(column[0]) for column in self._made[name])}, or those of other "
                "experts, are stored in different types, which is not supported; choose a file that stores all experts "
                "in one"
            )
        return found

    def _joined(self, name: str, dtype: torch.dtype, quantize: Storage) -> Weight | None:
        """Return the matrix of all experts; None where their matrices are of several kinds."""
        columns = self._made[name]
        stacked = [_stacked([self.inner.weight(part, dtype, quantize) for part in column]) for column in columns]
        return _interleaved(stacked, self._shapes[name][0])

    def _in_floats(self, name: str) -> bool:
        """Return whether the file has floats for all experts of `name`."""
        return self._bytes(name, torch.float32, None) == 4 * math.prod(self._shapes[name])

    def _bytes(self, name: str, dtype: torch.dtype, quantize: Storage) -> int:
        """Return the bytes of all matrices of the experts of `name`, each for itself."""
        return sum(self.inner.loaded_bytes(part, dtype, quantize) for column in self._made[name] for part in column)


def _found(shapes: Mapping[str, tuple[int, ...]], count: int) -> Iterator[tuple[str, _Columns]]:
    """Yield the tensors that can be made of those there are, and of which."""
    ones: dict[str, dict[str, dict[int, str]]] = {}
    for name, shape in shapes.items():
        if (found := _PAIR.match(name)) and len(shape) == 3:
            yield f"{found[1]}ffn_gate_up_exps.weight", ((name,), (f"{found[1]}ffn_up_exps.weight",))
        elif (
            (found := _STACK.match(name))
            and found[3] == "weight"
            and found[2] != "up"
            and shape
            and not shape[0] % count
        ):
            pair = ((name,), (f"{found[1]}switch_glu.up_proj.weight",))
            yield (f"{found[1]}gate_up_proj", pair) if found[2] == "gate" else (f"{found[1]}down_proj", pair[:1])
        elif found := _ONE.match(name):
            ones.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = name
    for prefix, kinds in ones.items():
        whole = {kind: names for kind, names in kinds.items() if len(names) == count}
        all_of = {kind: tuple(names.get(i, "") for i in range(count)) for kind, names in whole.items()}
        if "gate" in all_of and "up" in all_of:
            yield f"{prefix}gate_up_proj", (all_of["gate"], all_of["up"])
        if "down" in all_of:
            yield f"{prefix}down_proj", (all_of["down"],)


def _stacked(weights: Sequence[Weight]) -> Weight | None:
    """Return matrices of one kind one below the other; None where they are of several."""
    if len(weights) == 1:
        return weights[0]
    dense = [weight.tensor for weight in weights if isinstance(weight, DenseWeight)]
    if len(dense) == len(weights):
        return DenseWeight(torch.cat(dense))
    blocks = _alike(weights)
    if blocks is None or blocks[0].rows % GROUP:
        return None
    parts: dict[str, Any] = {part: torch.cat([getattr(each, part) for each in blocks]) for part in _tensors(blocks[0])}
    return BlockWeight(replace(blocks[0], rows=len(blocks) * blocks[0].rows, **parts))


def _interleaved(columns: Sequence[Weight | None], count: int) -> Weight | None:
    """Return a `count`-th of the first of `columns`, a `count`-th of the next, and so on, then the second `count`-th of
    the first; None where they are of several kinds."""
    weights = [column for column in columns if column is not None]
    if len(weights) < len(columns) or len(columns) == 1:
        return columns[0] if len(columns) == 1 else None

    def interleave(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.view(count, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 2)

    dense = [weight.tensor for weight in weights if isinstance(weight, DenseWeight)]
    if len(dense) == len(weights):
        return DenseWeight(interleave(dense))
    blocks = _alike(weights)
    if blocks is None or blocks[0].rows // count % GROUP:
        return None
    made: dict[str, Any] = {part: interleave([getattr(each, part) for each in blocks]) for part in _tensors(blocks[0])}
    return BlockWeight(replace(blocks[0], rows=len(blocks) * blocks[0].rows, **made))


def _alike(weights: Sequence[Weight]) -> list[BlockTensor] | None:
    """Return the blocks of `weights`; None where these are of several kinds, or in no blocks."""
    blocks = [weight.packed for weight in weights if weight.packed is not None]
    return blocks if len(blocks) == len(weights) and len(set(map(_kind, blocks))) == 1 else None


def _tensors(blocks: BlockTensor) -> list[str]:
    return [field.name for field in fields(blocks) if isinstance(getattr(blocks, field.name), Tensor)]


def _kind(blocks: BlockTensor) -> tuple[Any, ...]:
    return blocks.bits, blocks.table, blocks.columns, blocks.rows, *_tensors(blocks)
