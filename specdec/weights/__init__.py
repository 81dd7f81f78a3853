"""Where weights come from and how they are held: checkpoint readers, and matrices in floats or in blocks.

What: `SafetensorsCheckpoint` and `GGUFCheckpoint` have the methods of `checkpoint.Checkpoint`, and hand out `Weight`s.
Why: the decoder never asks how a matrix is stored; it calls `linear` and `rows`. Left out: names of tensors and models,
which belong to `specdec.model` and `specdec.weights.hub`.

The names are imported at their first use: `specdec.weights.hub` is read where torch is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdec.util.lazy import lazy

if TYPE_CHECKING:
    from specdec.weights.checkpoint import Checkpoint
    from specdec.weights.gguf.checkpoint import GGUFCheckpoint
    from specdec.weights.safetensors import SafetensorsCheckpoint
    from specdec.weights.tensors import BlockWeight, DenseWeight, Storage, Weight, quantize, table_weight

__all__ = [
    "BlockWeight",
    "Checkpoint",
    "DenseWeight",
    "GGUFCheckpoint",
    "SafetensorsCheckpoint",
    "Storage",
    "Weight",
    "quantize",
    "table_weight",
]

__getattr__ = lazy(
    __name__,
    {
        "checkpoint": ("Checkpoint",),
        "gguf.checkpoint": ("GGUFCheckpoint",),
        "safetensors": ("SafetensorsCheckpoint",),
        "tensors": ("BlockWeight", "DenseWeight", "Storage", "Weight", "quantize", "table_weight"),
    },
)
