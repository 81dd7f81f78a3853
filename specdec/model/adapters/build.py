"""From an adapter's file to the `Adapter` of a decoder that is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import FusedLayers, adapter_records, pack_low_rank
from specdec.model.adapters.adapter import PLAIN, Adapter, check_name
from specdec.model.adapters.files import FIELDS, AdapterFile, open_adapter, undo_interleaving
from specdec.model.decoder import Decoder
from specdec.model.spec import DecoderSpec
from specdec.model.stack import AdaptedLayers, Layer, Linear
from specdec.weights.metadata import naming
from specdec.weights.tensors import Weight


def check_adapters(files: Mapping[str, Path], spec: DecoderSpec) -> int:
    """Return the bytes that the adapters of `files` take in memory at the most, from their headers. Raises ValueError
    for one that does not fit a model of `spec`."""
    return sum(open_adapter(path, spec).nbytes for path in files.values())


def add_adapters(decoder: Decoder, files: Mapping[str, Path]) -> None:
    """Add the adapters of `files`, by name, to `decoder`; the first is the default. Raises ValueError as `load_adapter`
    does."""
    for name, path in files.items():
        load_adapter(decoder, name, path)
    decoder.adapters.default = next(iter(files), PLAIN)


def load_adapter(decoder: Decoder, name: str, path: str | Path) -> Adapter:
    """Read the adapter at `path`, and add it to `decoder` under `name`; return it.

    Raises ValueError as `open_adapter` does, for values that are not finite, and for a name that is taken.
    """
    check_name(name)
    file = open_adapter(path, decoder.spec)
    with naming(file.path):
        adapter = _Builder(decoder, file).build(name)
    decoder.adapters.add(adapter)
    return adapter


class _Builder:
    """Read the tensors of `file`, one matrix at a time."""

    def __init__(self, decoder: Decoder, file: AdapterFile) -> None:
        self.decoder, self.file = decoder, file
        self.nbytes = 0
        self.digest = hashlib.sha256()

    def build(self, name: str) -> Adapter:
        decoder = self.decoder
        layers = tuple(self._layer(i, layer) for i, layer in enumerate(decoder.layers))
        whole = any(one.startswith("layers.") for one in self.file.replaced)
        native = isinstance(decoder.stack.fused, FusedLayers)
        records = adapter_records(layers) if native and not whole else None  # None: its texts go op by op
        head = self._linear("lm_head.weight", Linear(decoder.head))
        embedding = self._linear("embed_tokens.weight", Linear(decoder.embedding)).weight
        projection = None
        if decoder.per_layer is not None:
            projection = self._linear("per_layer_model_projection.weight", decoder.per_layer.projection)
        return Adapter(
            name,
            self.digest.hexdigest(),
            AdaptedLayers(layers, records),
            self.nbytes,
            None if head.weight is decoder.head and head.low_rank is None else head,
            None if embedding is decoder.embedding else embedding,
            projection,
        )

    def _layer(self, index: int, layer: Layer) -> Layer:
        changed: dict[str, Any] = {}
        for module, field in FIELDS.items():
            linear = getattr(layer, field)
            if linear is not None:
                made = self._linear(f"layers.{index}.{module}.weight", linear, layer.spec.head_dim)
                changed |= {} if made is linear else {field: made}
        return replace(layer, **changed)

    def _linear(self, name: str, linear: Linear, head_dim: int = 0) -> Linear:
        """Return `linear` with what the file has for the matrix `name`; itself where the file has nothing."""
        if name in self.file.replaced:
            return replace(linear, weight=self._replaced(name, linear.weight))
        if name not in self.file.parts:
            return linear
        pair, read = self.file.parts[name], self.file.checkpoint.tensor
        down, up = read(pair.down), read(pair.up)
        if self.file.interleaved_rope and (".q_proj." in name or ".k_proj." in name):
            up = undo_interleaving(up, head_dim)
        self._note(f"{name} {pair.scale!r}", down, up)
        part = pack_low_rank(down, up, pair.scale).to(self.decoder.device)
        self.nbytes += part.nbytes
        return replace(linear, low_rank=part)

    def _replaced(self, name: str, weight: Weight) -> Weight:
        """Return a matrix in place of `weight`: in 8 bits where that is in blocks, for all that it is in fewer."""
        stored = self.file.replaced[name]
        made = self.file.checkpoint.weight(stored, self.decoder.dtype, None if weight.packed is None else "int8")
        self._note(name, made.dequantize())
        self.nbytes += made.nbytes
        return made.to(self.decoder.device)

    def _note(self, what: str, *tensors: Tensor) -> None:
        self.digest.update(what.encode())
        for tensor in tensors:
            self.digest.update(tensor.float().contiguous().view(torch.uint8).numpy().data)
