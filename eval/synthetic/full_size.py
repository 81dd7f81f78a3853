"""A decoder of full size with random weights: it has the time and memory of a published model, not its text.

What: the shapes in `configs/` (facts of published configs, in transformers' words) become a decoder with the blocks
that `specdec.load(..., quantize="int4")` makes of a float checkpoint: 4 bits with a minimum, and 8 bits for the
vocabulary. Left out: vision and audio parts, and files on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from eval.cli.names import DRAFTER_SUFFIX, full_size_names
from eval.synthetic.random_weights import RandomCheckpoint
from specdec.drafting.protocol import NoDraft
from specdec.hf import SpecdecForCausalLM
from specdec.memory.plan import free_bytes, weight_bytes
from specdec.model.build import Source, build_decoder
from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors

HEADROOM = 5 << 29  # bytes besides the weights: torch, float32 rings of K and V, the buffer of the bandwidth


def full_size_config(name: str) -> Any:
    """Return the transformers text config of `name`. Raises ValueError for an unknown name."""
    if name not in full_size_names():
        raise ValueError(f"there is no shape {name!r}; there are: {', '.join(full_size_names())}")
    return _config(f"{name}.json")


def full_size_drafter(name: str) -> Any | None:
    """Return the transformers config of the assistant that was published for `name`; None: there is none."""
    file = f"{name}{DRAFTER_SUFFIX}"
    return _config(file) if (resources.files("eval.synthetic") / "configs" / file).is_file() else None


def _config(file: str) -> Any:
    config = json.loads((resources.files("eval.synthetic") / "configs" / file).read_text(encoding="utf-8"))
    return AutoConfig.for_model(config.pop("model_type"), **config)


def full_size_model(
    name: str,
    progress: Callable[[str], None] | None = None,
    kv_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> SpecdecForCausalLM:
    """Build a model of the shape `name` on `device` (None: the CPU), with random blocks; `progress(name)` after each
    tensor. `kv_dtype`: of K and V; None: that of activations, float32, on a GPU bfloat16.

    Raises ValueError for an unknown name, and when the model's weights do not fit into the memory that is free.
    """
    config, device = full_size_config(name), device or torch.device("cpu")
    spec, dtype = decoder_spec(config), torch.float32 if device.type == "cpu" else torch.bfloat16
    check_memory(name, weight_bytes(expected_tensors(spec), "int4", dtype), free_bytes(device))
    checkpoint = RandomCheckpoint(spec, f"random {name}")
    decoder = build_decoder(
        spec,
        Source.huggingface(checkpoint, spec),
        dtype=dtype,
        device=device,
        quantize="int4",
        progress=progress,
        kv_dtype=kv_dtype,
    )
    return SpecdecForCausalLM(decoder, config, GenerationConfig(), NoDraft())


def check_memory(name: str, needed: int, available: int) -> None:
    """Raise a ValueError, before the memory is taken, when `needed` bytes and some room do not fit."""
    if needed + HEADROOM > available:
        raise ValueError(
            f"{name} needs {(needed + HEADROOM) / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free: "
            "close other programs, or run it on a larger machine"
        )
