"""Rows of llama.cpp's types as floats, and what the types are called.

What: `expand`. Why: the `gguf` package does it, but for Q8_K and Q1_0, which it knows by name alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from torch import Tensor

Bytes = npt.NDArray[np.uint8]


def expand(data: Bytes, kind: Type) -> Tensor:
    """Return rows of bytes [R, bytes] of any type that is read as float32 [R, K]."""
    raw = np.array(data)
    if kind == Type.Q8_K:
        blocks = torch.from_numpy(raw).view(len(raw), -1, 292)
        values = blocks[..., 4:260].contiguous().view(torch.int8).float()
        return (float32(blocks[..., :4])[..., None] * values).flatten(1)
    if kind == Type.Q1_0:
        blocks = torch.from_numpy(raw).view(len(raw), -1, 18)
        scale = blocks[..., :2].contiguous().view(torch.float16).float()  # [R, B, 1]
        return torch.where(signs(blocks[..., 2:]) > 0, scale, -scale).flatten(1)
    return torch.from_numpy(dequantize(raw, kind))


def float32(raw: Tensor) -> Tensor:
    """View [..., 4] bytes as [...] float32."""
    return raw.contiguous().view(torch.float32).squeeze(-1)


def signs(packed: Tensor) -> Tensor:
    """Unpack [..., n] bytes to [..., 8n] bits, the lowest of a byte first."""
    return (packed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def name_of(kind: int) -> str:
    """Return what ggml calls the type `kind`; its number where the `gguf` package does not know it."""
    return kind.name if isinstance(kind, Type) else f"the unknown type {kind}"
