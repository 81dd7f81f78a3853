"""Tiny decoders whose layers are passes of a GPU: on the GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.triton.passes.graphs import CUDACapture, Graphs
from specdec.kernels.triton.passes.layers import DeviceLayers
from specdec.kernels.triton.product import KERNEL_FORMS
from specdec.model.decoder import Decoder
from specdec.model.experts import Experts
from specdec.model.stack import Layer, Linear, Stack
from specdec.weights.tensors import Weight, quantize
from tests.support.tiny_decoder import quantised
from tests.support.triton.here import DEVICE
from tests.support.triton.recorder import Recorder


def graphs_here() -> Graphs:
    """Return graphs of the GPU; without one, those that record launches and make them again."""
    return Graphs(CUDACapture() if DEVICE.type == "cuda" else Recorder())


def passes_of(stack: Stack, graphs: Graphs) -> DeviceLayers:
    """Let `stack` make its passes at once, whatever kernels are in use on the CPU."""
    layers = stack.layers
    passes = DeviceLayers(
        layers,
        stack.stores,
        stack.norm,
        lambda: True,
        lambda form: form in KERNEL_FORMS,
        lambda view, rows: True,
        graphs,
    )
    stack._fused = passes
    return passes


def device_decoder(
    family: str, storage: str, numbers: Sequence[int], graphs: Graphs | None = None, kept: torch.dtype | None = None
) -> Decoder:
    """Return a decoder of some layers of the tiny model of `family`, with matrices in `storage`: as passes with
    `graphs`, or where that is None op by op on the CPU, in torch's or the native arithmetic."""
    made = quantised(family, storage)
    assert made.head is made.embedding and made.per_layer is None
    embedding: Weight = quantize(made.embedding.dequantize(), "int8")
    layers, norm = [made.layers[i] for i in numbers], made.norm
    if graphs is not None:
        embedding, layers, norm = embedding.to(DEVICE), [_moved(layer) for layer in layers], norm.to(DEVICE)
    decoder = Decoder(made.spec, embedding, layers, norm, embedding, None, kept)
    if graphs is None:
        decoder.stack._fused = None
    else:
        passes_of(decoder.stack, graphs)
    return decoder


def run(decoder: Decoder, ids: Tensor, chunks: Sequence[int]) -> Tensor:
    """Return the last states of ids [n], with `chunks` rows in the passes, on the CPU: [n, hidden]."""
    cache, found = decoder.new_cache(), []
    for part in ids.to(decoder.device).split(list(chunks)):
        found.append(decoder.forward(part, cache).last.cpu())
        cache.commit(len(part))
    return torch.cat(found)


def _moved(layer: Layer) -> Layer:
    parts: dict[str, Any] = {}
    for field in fields(layer):
        part = getattr(layer, field.name)
        if isinstance(part, Tensor):
            parts[field.name] = part.to(DEVICE)
        elif isinstance(part, Linear):
            bias = None if part.bias is None else part.bias.to(DEVICE)
            parts[field.name] = Linear(part.weight.to(DEVICE), bias)
        elif isinstance(part, Experts):
            values = {field.name: getattr(part, field.name) for field in fields(part)}
            there = {name: value.to(DEVICE) for name, value in values.items() if hasattr(value, "to")}
            parts[field.name] = replace(part, **there)
    return replace(layer, **parts)
