"""Tiny models that draft for tiny models: the same one, one that nearly agrees with it, another one."""

from __future__ import annotations

from pathlib import Path

import torch

from specdec.drafting.draft_model.draft_model import DraftModel
from specdec.model.decoder import Decoder
from specdec.weights.tensors import DenseWeight
from tests.support.tiny_decoder import of


def draft_model(family: str, unlike: float = 0.0, storage: str | None = "int8") -> DraftModel:
    """The tiny model of `family` as a drafter. `unlike`: how far its output matrix is moved, in its own deviations;
    `storage`: of its matrices, None: floats."""

    def build(backbone: Decoder) -> Decoder:
        made = of(family, backbone.kv_dtype, storage)
        head = made.head.dequantize()
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(5))
        moved = made.head if not unlike else DenseWeight(head + unlike * head.std() * noise)
        return Decoder(made.spec, made.embedding, made.layers, made.norm, moved, made.per_layer, backbone.kv_dtype)

    return DraftModel(Path("tiny"), of(family, None, storage).spec, build)
