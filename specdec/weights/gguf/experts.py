"""Experts in a GGUF file under the names of Ollama's converter, as llama.cpp's converter has them.

What: `FusedExperts` gives gate and up of each expert, which lie in two tensors (`ffn_gate_exps`, `ffn_up_exps`), as one
(`ffn_gate_up_exps`), and the experts' scales by one name. Left out: gate and up of different types.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import GROUP, BlockTensor
from specdec.weights.checkpoint import Checkpoint
from specdec.weights.metadata import one_line
from specdec.weights.tensors import BlockWeight, DenseWeight, Storage, Weight

_SPLIT = re.compile(r"^(blk\.\d+\.)ffn_gate_exps\.weight$")
_SCALE = re.compile(r"^(blk\.\d+\.)ffn_gate_inp\.per_expert_scale$")


def with_fused_experts(checkpoint: Checkpoint) -> Checkpoint:
    """Return `checkpoint`, or a `FusedExperts` of it where experts have the names of Ollama's converter."""
    names = checkpoint.shapes()
    return FusedExperts(checkpoint) if any(_SPLIT.match(n) or _SCALE.match(n) for n in names) else checkpoint


class FusedExperts:
    """Hold a checkpoint in which gate and up of the experts of `inner` are one tensor [E, 2 * width, hidden]."""

    def __init__(self, inner: Checkpoint) -> None:
        """Find the pairs in `inner`. A gate without its up, or of another shape, is left as it is: the model then lacks
        a tensor, and has one too many."""
        self.inner, shapes = inner, inner.shapes()
        self._pairs: dict[str, tuple[str, str]] = {}  # by the name of the fused tensor
        self._renamed: dict[str, str] = {}
        for name, shape in shapes.items():
            if (found := _SPLIT.match(name)) and len(shape) == 3:
                fused, up = f"{found[1]}ffn_gate_up_exps.weight", f"{found[1]}ffn_up_exps.weight"
                if shapes.get(up) == shape and fused not in shapes:
                    self._pairs[fused] = (name, up)
            elif found := _SCALE.match(name):
                self._renamed.setdefault(f"{found[1]}ffn_down_exps.scale", name)

    @property
    def path(self) -> Path:
        """Return the file."""
        return self.inner.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape."""
        shapes = self.inner.shapes()
        for fused, (gate, up) in self._pairs.items():
            count, width, hidden = shapes.pop(gate)
            del shapes[up]
            shapes[fused] = (count, 2 * width, hidden)
        for name, stored in self._renamed.items():
            shapes[name] = shapes.pop(stored)
        return shapes

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of the tensor, as the inner checkpoint counts them."""
        parts = self._pairs.get(name, (self._renamed.get(name, name),))
        return sum(self.inner.loaded_bytes(part, dtype, quantize) for part in parts)

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32."""
        return self.inner.tensor(self._renamed.get(name, name))

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`; of a fused tensor each expert's rows of gate, then those of up.

        Raises ValueError when gate and up become blocks of different kinds.
        """
        if name not in self._pairs:
            return self.inner.weight(name, dtype, quantize, rows)
        assert rows is None, "experts are read whole"
        count, width, _ = self.inner.shapes()[self._pairs[name][0]]
        gate, up = (self.inner.weight(part, dtype, quantize) for part in self._pairs[name])
        if isinstance(gate, DenseWeight) and isinstance(up, DenseWeight):
            return DenseWeight(_interleave(gate.tensor, up.tensor, count))
        ours, theirs = gate.packed, up.packed
        if ours is None or theirs is None or _kind(ours) != _kind(theirs) or width % GROUP:
            raise ValueError(
                f"{self.path}: {' and '.join(map(one_line, self._pairs[name]))} are stored in different types, which "
                "is not supported; choose a file that stores both in one"
            )
        parts: dict[str, Any] = {
            part: _interleave(getattr(ours, part), getattr(theirs, part), count) for part in _tensors(ours)
        }
        return BlockWeight(replace(ours, rows=2 * ours.rows, **parts))


def _interleave(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Return a `count`-th of `first`, a `count`-th of `second`, the next one of `first`, and so on."""
    parts = torch.stack([each.view(count, -1, *each.shape[1:]) for each in (first, second)], dim=1)
    return parts.flatten(0, 2)


def _tensors(blocks: BlockTensor) -> list[str]:
    return [field.name for field in fields(blocks) if isinstance(getattr(blocks, field.name), Tensor)]


def _kind(blocks: BlockTensor) -> tuple[Any, ...]:
    return blocks.bits, blocks.table, blocks.columns, blocks.rows, _tensors(blocks)
