"""Decoders of the tiny models with other weights or another cache than they come with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specdec import kernels
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.stack import Linear
from specdec.weights.tensors import BlockWeight, quantize
from tests.support.tiny import tiny_model

# forms of blocks that no float weight is quantised to: bits, table, factors for 16 inputs
CODED: dict[str, tuple[int, str | None, bool]] = {
    "table": (4, "iq4", False), "six": (6, None, True), "three": (3, None, True),
    "fp4": (4, "fp4", True), "iq2": (3, "iq2", True), "two": (2, None, True),
}  # fmt: skip


def coded(x: Tensor, bits: int, table: str | None, sub: bool) -> kernels.BlockTensor:
    """The nearest weights of a form to x [N, K], with scales that reach the largest of each 16 or 32 inputs."""
    numbers = torch.arange(1 << bits) - (1 << bits - 1) * 1.0
    if table is not None:
        numbers = kernels.TABLES[table].numbers[: 1 << bits] * kernels.TABLES[table].unit
    if bits == 2:
        numbers = torch.arange(4) - 1.5
    parts = x.view(len(x), -1, 16)
    largest = parts.abs().amax(-1)  # [N, K / 16]
    whole = largest.view(len(x), -1, 2).amax(-1)  # [N, K / 32]
    steps = 15 if bits == 2 else 100
    factor = (largest / whole.repeat_interleave(2, 1) * steps).round().clamp(1) if sub else None
    scale = (whole / numbers.abs().max() / (steps if sub else 1)).half()
    of_each = scale.float().repeat_interleave(2, 1) * (1 if factor is None else factor)
    codes = (parts[..., None] / of_each[..., None, None] - numbers).abs().argmin(-1).view(x.shape)
    if bits == 2:
        both = factor.to(torch.uint8)
        return kernels.pack_blocks(codes, scale, -1.5 * scale.float(), 2, sub=both | both << 4)
    return kernels.pack_blocks(
        codes, scale, None, bits, table=table, sub=None if factor is None else factor.to(torch.int8)
    )


def stored(linear: Linear, storage: str) -> Linear:
    if storage in CODED:
        return Linear(BlockWeight(coded(linear.weight.dequantize(), *CODED[storage])), linear.bias)
    kind = "int4" if storage == "int5" else storage
    weight = quantize(linear.weight.dequantize(), kind, name="w")
    if storage == "int5":
        values, scale, minimum = kernels.unpack_blocks(weight.blocks)
        weight = BlockWeight(kernels.pack_blocks(2 * values + 1, scale / 2, minimum, 5))
    return Linear(weight, linear.bias)


def coded_kinds(number: int) -> tuple[str, str]:
    """The forms of the experts' matrices in layer `number`: every one in some layer."""
    names = tuple(CODED)
    return names[2 * number % len(names)], names[(2 * number + 1) % len(names)]


@cache
def quantised(family: str, storage: str) -> Decoder:
    """The tiny model of `family` in blocks; "mixed": matrices of a layer in 4, 5 and 8 bits; "coded": `CODED`."""
    decoder = decoder_of(tiny_model(family))
    layers = []
    for layer in decoder.layers:
        parts: dict[str, Any] = {}
        for i, name in enumerate(("q", "k", "v", "o", "gate", "up", "down", "ple_gate", "ple_projection")):
            if (linear := getattr(layer, name)) is not None:
                mixes = {"mixed": ("int4", "int5", "int8"), "coded": tuple(CODED)}.get(storage, (storage,))
                parts[name] = stored(linear, mixes[i % len(mixes)])
        if (experts := layer.experts) is not None:
            kinds = {"mixed": ("int5", "int8"), "coded": coded_kinds(len(layers))}.get(storage, (storage, storage))
            gate_up, down = (stored(Linear(w), kind).weight for w, kind in zip(experts.matrices, kinds, strict=False))
            parts["experts"] = replace(experts, gate_up=gate_up, down=down)
        layers.append(replace(layer, **parts))
    return Decoder(decoder.spec, decoder.embedding, layers, decoder.norm, decoder.head, decoder.per_layer)


def of(family: str, kept: torch.dtype | None, storage: str | None = None) -> Decoder:
    """The tiny model with a cache of `kept`; `storage`: of its matrices, which then take one native call a pass."""
    made = decoder_of(tiny_model(family)) if storage is None else quantised(family, storage)
    return Decoder(made.spec, made.embedding, made.layers, made.norm, made.head, made.per_layer, kept)
