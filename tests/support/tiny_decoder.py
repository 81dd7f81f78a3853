"""Decoders of the tiny models with other weights or another cache than they come with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from specdec import kernels
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.stack import Linear
from specdec.weights.tensors import BlockWeight, quantize
from tests.support.tiny import tiny_model


def stored(linear: Linear, storage: str) -> Linear:
    kind = "int4" if storage == "int5" else storage
    weight = quantize(linear.weight.dequantize(), kind, name="w")
    if storage == "int5":
        values, scale, minimum = kernels.unpack_blocks(weight.blocks)
        weight = BlockWeight(kernels.pack_blocks(2 * values + 1, scale / 2, minimum, 5))
    return Linear(weight, linear.bias)


@cache
def quantised(family: str, storage: str) -> Decoder:
    """The tiny model of `family` in blocks; "mixed": matrices of a layer in 4, 5 and 8 bits."""
    decoder = decoder_of(tiny_model(family))
    layers = []
    for layer in decoder.layers:
        parts: dict[str, Any] = {}
        for i, name in enumerate(("q", "k", "v", "o", "gate", "up", "down", "ple_gate", "ple_projection")):
            if (linear := getattr(layer, name)) is not None:
                parts[name] = stored(linear, ("int4", "int5", "int8")[i % 3] if storage == "mixed" else storage)
        if (experts := layer.experts) is not None:
            kinds = ("int5", "int8") if storage == "mixed" else (storage, storage)
            gate_up, down = (stored(Linear(w), kind).weight for w, kind in zip(experts.matrices, kinds, strict=False))
            parts["experts"] = replace(experts, gate_up=gate_up, down=down)
        layers.append(replace(layer, **parts))
    return Decoder(decoder.spec, decoder.embedding, layers, decoder.norm, decoder.head, decoder.per_layer)


def of(family: str, kept: torch.dtype | None, storage: str | None = None) -> Decoder:
    """The tiny model with a cache of `kept`; `storage`: of its matrices, which then take one native call a pass."""
    made = decoder_of(tiny_model(family)) if storage is None else quantised(family, storage)
    return Decoder(made.spec, made.embedding, made.layers, made.norm, made.head, made.per_layer, kept)
