"""A random low-rank adapter on all matrices of a decoder's layers: for speed and memory, not for text."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from specdec.kernels import FusedLayers, adapter_records, pack_low_rank
from specdec.model.adapters.adapter import Adapter
from specdec.model.decoder import Decoder
from specdec.model.stack import AdaptedLayers, Layer, Linear

NAME = "random"


def add_random_adapter(decoder: Decoder, rank: int) -> Adapter:
    """Add an adapter called "random" of so many ranks to `decoder`, in bfloat16, and return it."""
    generator = torch.Generator().manual_seed(rank)
    sizes = []

    def adapted(linear: Linear) -> Linear:
        outputs, inputs = linear.weight.shape
        down = torch.randn(rank, inputs, generator=generator, dtype=torch.float32) * (0.05 / inputs**0.5)
        up = torch.randn(outputs, rank, generator=generator, dtype=torch.float32)
        part = pack_low_rank(down.bfloat16(), up.bfloat16(), 1.0).to(decoder.device)
        sizes.append(part.nbytes)
        return replace(linear, low_rank=part)

    def layer_of(layer: Layer) -> Layer:
        found = {field.name: getattr(layer, field.name) for field in fields(layer)}
        changed: dict[str, Any] = {name: adapted(one) for name, one in found.items() if isinstance(one, Linear)}
        return replace(layer, **changed)

    layers = tuple(map(layer_of, decoder.layers))
    records = adapter_records(layers) if isinstance(decoder.stack.fused, FusedLayers) else None
    adapter = Adapter(NAME, f"random {rank}", AdaptedLayers(layers, records), sum(sizes))
    decoder.adapters.add(adapter)
    return adapter
