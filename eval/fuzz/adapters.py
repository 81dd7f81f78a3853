"""Whole adapters (LoRA) for `python -m eval.fuzz`, a PEFT folder and a GGUF file, and how a damaged one is read."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.model.adapters.build import add_adapters
from specdec.model.decoder import Decoder
from specdec.model.names import gguf_name

RANK = 4
MODULES = {"self_attn.q_proj": "q", "mlp.down_proj": "down"}


def write_adapters(folder: Path, decoder: Decoder, architecture: str) -> None:
    """Write an adapter of the model of `decoder` into both folders: `folder` and "-peft", `folder` and "-gguf"."""
    tensors: dict[str, Tensor] = {}
    peft, other = (folder.with_name(f"{folder.name}-{kind}") for kind in ("peft", "gguf"))
    peft.mkdir()
    other.mkdir()
    writer = gguf.GGUFWriter(other / "adapter.gguf", architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for index, layer in enumerate(decoder.layers):
        for module, field in MODULES.items():
            outputs, inputs = getattr(layer, field).weight.shape
            a, b = (
                torch.randn(RANK, inputs, dtype=torch.float32) * 0.1,
                torch.randn(outputs, RANK, dtype=torch.float32) * 0.1,
            )
            name = f"layers.{index}.{module}"
            full = f"base_model.model.model.{name}"
            tensors |= {f"{full}.lora_A.weight": a, f"{full}.lora_B.weight": b}
            stem = gguf_name(decoder.spec, f"{name}.weight")
            writer.add_tensor(f"{stem}.lora_a", a.numpy())
            writer.add_tensor(f"{stem}.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, peft / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": sorted(module.rpartition(".")[2] for module in MODULES),
        "rank_pattern": {"layers.0.self_attn.q_proj": RANK},
        "alpha_pattern": {"down_proj": 4},
        "layers_to_transform": [*range(len(decoder.layers))],
    }
    (peft / "adapter_config.json").write_text(json.dumps(settings))


def read_adapter(folder: Path, decoder: Decoder) -> None:
    """Read the adapter in `folder` for a model of its own around the parts of `decoder`, and run a pass with it.

    Raises ValueError as `add_adapters` does.
    """
    parts = (decoder.spec, decoder.embedding, decoder.layers, decoder.norm, decoder.head, decoder.per_layer)
    fresh = Decoder(*parts)
    add_adapters(fresh, {"one": folder})
    fresh.logits(fresh.forward(torch.tensor([5, 6, 7], dtype=torch.int64), fresh.new_cache()).last)
