"""Where weights come from and how they are held: checkpoint readers, and matrices in floats or in blocks.

What: `SafetensorsCheckpoint` and `GGUFCheckpoint` answer the same four questions (`checkpoint.Checkpoint`)
and hand out `Weight`s. Why: the decoder never asks how a matrix is stored; it calls `linear` and `rows`. Left
out: names of tensors and models, which belong to `specdec.model` and `specdec.weights.hub`.
"""

from specdec.weights.checkpoint import Checkpoint
from specdec.weights.gguf import GGUFCheckpoint
from specdec.weights.safetensors import SafetensorsCheckpoint
from specdec.weights.tensors import BlockWeight, DenseWeight, Storage, Weight, quantize

__all__ = [
    "BlockWeight",
    "Checkpoint",
    "DenseWeight",
    "GGUFCheckpoint",
    "SafetensorsCheckpoint",
    "Storage",
    "Weight",
    "quantize",
]
