"""Tiny adapters (LoRA) of the tiny models: PEFT folders and GGUF files with random numbers, and the merged models."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors, gguf_name
from specdec.model.spec import DecoderSpec
from tests.support.tiny import tiny_model

RANK, ALPHA = 4, 12
SCALE = ALPHA / RANK


def tiny_spec(family: str) -> DecoderSpec:
    return decoder_spec(tiny_model(family).config)


def modules(family: str) -> dict[str, tuple[int, int]]:
    """Canonical names and shapes of every linear of the layers that can be adapted, and of what stands beside them."""
    shapes = {name: shape for name, shape in expected_tensors(tiny_spec(family)).items() if ".router." not in name}
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2 and ("layers." in name or name.startswith("per_layer_model"))
    }


def parts(shapes: Mapping[str, tuple[int, int]], seed: int, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """Random A [r, in] and B [out, r] for each module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, inputs, generator=generator) * 0.1,
            torch.randn(outputs, rank, generator=generator) * 0.1,
        )
        for name, (outputs, inputs) in shapes.items()
    }


def make_peft(
    folder: Path,
    family: str = "gemma3",
    seed: int = 0,
    low_rank: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    prefix: str = "model.",
    more: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A PEFT folder: all linears with `RANK` and `ALPHA`, or `low_rank`; `prefix`: of the modules' names; `more`:
    tensors besides; `config`: settings in place of the usual ones."""
    low_rank = parts(modules(family), seed) if low_rank is None else low_rank
    tensors = dict(more or {})
    for name, (a, b) in low_rank.items():
        full = f"base_model.model.{'' if name == 'lm_head' else prefix}{name}"
        tensors |= {f"{full}.lora_A.weight": a.contiguous(), f"{full}.lora_B.weight": b.contiguous()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] for name in low_rank}),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def merged(
    family: str, low_rank: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float] | None = None
) -> PreTrainedModel:
    """The tiny model with W + s B A in place of W, in float32."""
    model = copy.deepcopy(tiny_model(family))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in low_rank.items():
            scale = (scales or {}).get(name, SCALE)
            full = "lm_head.weight" if name == "lm_head" else f"model.{name}.weight"
            if name == "lm_head":  # untied: the embedding stays as it is
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + scale * (b @ a))
            else:
                weights[full] += scale * (b @ a)
    return model


class LowRankLinear(torch.nn.Module):
    """x W^T + (x A^T) B^T s, as PEFT's `lora.Linear` computes it: the products apart, the scale last."""

    def __init__(self, base: torch.nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = torch.nn.Parameter(down), torch.nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + torch.nn.functional.linear(torch.nn.functional.linear(x, self.down), self.up) * self.scale


def unmerged(
    family: str, low_rank: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]
) -> PreTrainedModel:
    """The tiny model with its low-rank parts beside the weights, in float32; `.double()` makes it float64 (but for
    norms and rope, which transformers computes in float32)."""
    model = copy.deepcopy(tiny_model(family))
    for name, (a, b) in low_rank.items():
        full = f"model.{name}"
        model.set_submodule(full, LowRankLinear(model.get_submodule(full), a, b, scales[name]))
    return model


def rank_stabilised(rank: int) -> float:
    return ALPHA / math.sqrt(rank)


def make_gguf(
    path: Path,
    family: str = "gemma3",
    low_rank: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    alpha: float | None = ALPHA,
    arch: str | None = None,
    **keys: str,
) -> Path:
    """A GGUF adapter as llama.cpp's converter writes it: its names, its order of Llama's rows, alpha among the keys."""
    spec = tiny_spec(family)
    low_rank = parts(modules(family), 0) if low_rank is None else low_rank
    writer = gguf.GGUFWriter(path, arch or spec.model_type.split("_")[0])
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **keys}.items():
        writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in low_rank.items():
        if spec.model_type == "llama" and name.endswith(("q_proj", "k_proj")):
            head = spec.layers[0].head_dim
            b = b.reshape(-1, 2, head // 2, b.shape[1]).transpose(1, 2).reshape(b.shape)
        stem = name if "." in name and not name.startswith("layers") else gguf_name(spec, f"{name}.weight")
        writer.add_tensor(f"{stem}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{stem}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
