"""A decoder of full size with random weights: what a published model costs in time and memory, not what it says.

What: the shapes in `eval/configs/` (facts of published configs, in transformers' words) become a decoder whose blocks
are what `specdec.load(..., quantize="int4")` makes of a float checkpoint: 4 bits with a minimum, and 8 bits for the
vocabulary. Left out: vision and audio parts, and files on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from eval.random_weights import RandomCheckpoint
from specdec.drafting import NoDraft
from specdec.hf import SpecdecForCausalLM
from specdec.model.build import Source, build_decoder
from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors
from specdec.model.spec import DecoderSpec

BYTES = {"4 bit": 0.625, "8 bit": 1.0625}  # a weight, with its share of the float16 scale and minimum
HEADROOM = 5 << 29  # bytes besides the weights: torch, float32 rings of K and V, the buffer of the bandwidth


def full_size_names() -> list[str]:
    folder = resources.files("eval") / "configs"
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".json"))


def full_size_config(name: str) -> Any:
    """The transformers text config of `name`. Raises ValueError for an unknown one."""
    if name not in full_size_names():
        raise ValueError(f"there is no shape {name!r}; there are: {', '.join(full_size_names())}")
    text = (resources.files("eval") / "configs" / f"{name}.json").read_text(encoding="utf-8")
    config = json.loads(text)
    return AutoConfig.for_model(config.pop("model_type"), **config)


def full_size_model(name: str, progress: Callable[[str], None] | None = None) -> SpecdecForCausalLM:
    """A model of the shape `name` on the CPU, with random blocks; `progress(name)` after each tensor.

    Raises ValueError for an unknown name, and when its weights do not fit into the memory that is free.
    """
    config = full_size_config(name)
    spec = decoder_spec(config)
    check_memory(name, weight_bytes(spec), available_memory())
    checkpoint = RandomCheckpoint(spec, f"random {name}")
    decoder = build_decoder(
        spec,
        Source.huggingface(checkpoint, spec),
        dtype=torch.float32,
        device=torch.device("cpu"),
        quantize="int4",
        progress=progress,
    )
    return SpecdecForCausalLM(decoder, config, GenerationConfig(), NoDraft())


def weight_bytes(spec: DecoderSpec) -> int:
    """Bytes of the matrices of `spec` when its vocabulary takes 8 bits and everything else 4."""
    total = 0.0
    for name, shape in expected_tensors(spec).items():
        if len(shape) == 2:
            vocabulary = name in ("embed_tokens.weight", "lm_head.weight")
            total += prod(shape) * BYTES["8 bit" if vocabulary else "4 bit"]
    return int(total)


def check_memory(name: str, needed: int, available: int | None) -> None:
    """Raise a ValueError, before the memory is taken, when `needed` bytes and some room do not fit."""
    if available is not None and needed + HEADROOM > available:
        raise ValueError(
            f"{name} needs {(needed + HEADROOM) / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free: "
            "close other programs, or run it on a larger machine"
        )


def available_memory() -> int | None:
    """Bytes that a new process can take without swapping, where Linux tells; None elsewhere."""
    file = Path("/proc/meminfo")
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
