"""Weights go to a device one at a time: the machine's memory never holds two of them.

The device is torch's "meta", which keeps shapes and no numbers: what lies there takes no memory of the machine.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.load import load_decoder
from specdec.model.build import TensorReader
from specdec.open import open_checkpoint
from specdec.weights.packed import PackedFile
from specdec.weights.safetensors import SafetensorsCheckpoint
from tests.support.tiny import tiny_model

META = torch.device("meta")


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_one_tensor_is_in_memory_at_a_time(quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    weight, tensor = SafetensorsCheckpoint.weight, SafetensorsCheckpoint.tensor

    def watch(given: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(given))
        most = max(most, sum(ref() is not None for ref in alive))

    def watched_weight(self: SafetensorsCheckpoint, *arguments: Any) -> Any:
        made = weight(self, *arguments)
        watch(made.tensor if made.packed is None else made.packed.q)
        return made

    def watched_tensor(self: SafetensorsCheckpoint, name: str) -> Tensor:
        watch(made := tensor(self, name))
        return made

    monkeypatch.setattr(SafetensorsCheckpoint, "weight", watched_weight)
    monkeypatch.setattr(SafetensorsCheckpoint, "tensor", watched_tensor)
    decoder, *_ = load_decoder(tmp_path, torch.bfloat16, META, quantize)
    assert decoder.device == META
    assert len(alive) > 30
    assert most <= 2, "one that is being read, and one that is on its way"


def test_a_packed_file_goes_to_the_device_matrix_by_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("specdec.model.quantized.LEAST", 0)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    read: list[str] = []
    weight = PackedFile.weight

    def watched(self: PackedFile, name: str) -> Any:
        read.append(name)
        return weight(self, name)

    monkeypatch.setattr(PackedFile, "weight", watched)
    decoder, *_ = load_decoder(tmp_path / "model", torch.bfloat16, META, "int4")
    assert len(read) == 1 + 4 * 7, "the embedding, and each layer's matrices, once"
    for layer in decoder.layers:
        assert layer.down.weight.packed is not None and layer.down.weight.packed.device == META
    assert decoder.norm.device == META and decoder.norm.dtype == torch.bfloat16


def test_reading_for_a_device_makes_no_arena(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    spec, source, *_ = open_checkpoint(tmp_path)
    reader = TensorReader(spec, source, torch.bfloat16, META, "int4", None)
    assert reader.matrix("layers.0.mlp.up_proj.weight").packed is not None
    assert reader._arena._used == 0
