"""`specdec.load`: a name or path in, a model ready to `generate` out."""

from __future__ import annotations

import inspect
import math
import os
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from specdec import kernels
from specdec.drafting.calibrate import calibrate
from specdec.drafting.learned import learned_file
from specdec.drafting.protocol import bind_drafter
from specdec.drafting.registry import DrafterLike, draft_spec, drafter_bytes, drafter_identity, resolve_drafter
from specdec.hf import SpecdecForCausalLM
from specdec.memory.plan import (
    LARGEST_PICTURE,
    PROGRAM,
    Planner,
    conversations_of,
    expert_bytes,
    experts_in_free_memory,
    loaded_bytes,
    parse_bytes,
    program_bytes,
)
from specdec.model import quantized
from specdec.model.adapters.adapter import AdapterLike, adapter_files
from specdec.model.adapters.build import add_adapters, check_adapters
from specdec.model.build import Quantize, Source, assemble, build_decoder
from specdec.model.decoder import Decoder, MemoryLimits
from specdec.model.names import expected_tensors
from specdec.model.spec import DecoderSpec
from specdec.open import open_checkpoint
from specdec.util.device import resolve_device
from specdec.util.progress import progress_bar
from specdec.util.text import did_you_mean
from specdec.util.threads import turn_to_compute
from specdec.weights.hub.paths import model_path
from specdec.weights.metadata import naming
from specdec.weights.safetensors import safetensors_of

_INTERPRETED = (
    "Triton's interpreter computes, on the CPU, as SPECDEC_KERNELS and TRITON_INTERPRET ask: for checks on tiny "
    "models; a token of a real one takes minutes"
)
# Arguments of transformers' `from_pretrained`, and what to write instead.
_INSTEAD = {
    "attn_implementation": "leave it out: its attention has one implementation",
    "cache_dir": "set SPECDEC_CACHE, or HF_HOME for a hub id",
    "device_map": 'write device="cpu" or device="cuda": a model is on one device',
    "load_in_4bit": 'write quantize="int4"',
    "load_in_8bit": 'write quantize="int8"',
    "config": "leave it out: a folder's config is in the folder",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "low_cpu_mem_usage": "leave it out: weights stream in a tensor at a time",
    "max_memory": 'write memory_budget="9GB"',
    "offload_folder": "leave it out: weights are mapped from the file",
    "quantization_config": 'write quantize="int4" or quantize="int8"',
    "state_dict": "save the weights to a folder, and name the folder",
    "subfolder": "name that folder",
    "token": "set HF_TOKEN",
    "torch_dtype": "write dtype=",
    "trust_remote_code": "leave it out: code from a model folder is never run",
    "revision": "fetch that revision first, and name its folder",
    "use_safetensors": "leave it out: weights are read from .safetensors and .gguf alone",
}


def load(
    name_or_path: str | os.PathLike[str],
    drafter: DrafterLike = "auto",
    dtype: torch.dtype | str | None = None,
    quantize: Quantize = None,
    device: torch.device | str | int | None = None,
    kv_dtype: torch.dtype | str | None = None,
    memory_budget: int | str | None = None,
    remember: bool = False,
    adapter: AdapterLike = None,
    **foreign: Any,
) -> SpecdecForCausalLM:
    """Load a model that generates the text of the plain model, sooner.

    Args:
        name_or_path: "smollm2-135m-instruct" or "gemma-3-270m" (fetched on first use), a .gguf file, a folder in the
            Hugging Face format (safetensors) or with one model as .gguf, a model of the hub ("owner/name",
            "owner/name:Q4_0", "owner/name/file.gguf"), or one that Ollama keeps ("ollama:gemma4:12b").
        drafter: "auto" (suffix matches, and a trained head: the one that lies beside the model, or the one that comes
            with the package for it), "suffix", None (plain decoding), a head (a trained one, a Gemma 4 assistant), a
            smaller model of the same vocabulary, under any name that a model has here, or a `Drafter`. A drafter never
            changes the text.
        dtype: the type of activations and of weights that are not quantised; None: float32 on the CPU, bfloat16 on a
            GPU.
        quantize: "int4" (4 bits, the vocabulary in 8 bits), "int4-all" or "int8" quantise what a checkpoint has in
            floats while it streams in (matrices that were trained for 4 bits take 4 bits with their own steps); "none"
            expands a quantised checkpoint to `dtype`; None keeps weights as they are stored.
        device: "cpu", "cuda", "cuda:1" (or 1) for the second, "mps"; None: CUDA where there is a GPU for it, else the
            CPU, on a Mac too. Where torch computes on a GPU (docs/gpu.md), a drafted text may differ from the plain one
            where two tokens nearly tie.
        kv_dtype: the type in which the cache keeps K and V: "float32", "bfloat16", "float16" or "int8"; None: `dtype`.
            Attention reads rounded K and V, so another type may give another text; drafting never does.
        memory_budget: bytes, or text like "9GB", that this process may take in all; of a GPU's memory where the model
            is on one. A model that does not fit is refused before it is read; a prompt that does not fit is refused
            before it is computed.
        adapter: a low-rank adapter (LoRA), a PEFT folder, a GGUF file or a hub id, or several: {"name": path}. Adapters
            are kept apart from the weights. The first is the default; `generate(adapter="name")` takes another one,
            "none" the model as it is.
        remember: begin with the costs and the acceptance that the last such program measured here, and keep them in
            the cache folder when this one ends or drops the model. Without it every load measures, and begins afresh.

    The model keeps the caches of former conversations, so that a prompt that continues one is not computed again. The
    caches take the rest of the memory budget; without a budget, an eighth of the memory that is free now
    (`model.conversations.limit`, in bytes; 0: none).

    With a drafter, loading takes about a second longer: it measures the costs of passes of several lengths and of
    drafted tokens on this machine. Adaptive draft lengths follow from these costs.

    A checkpoint of more than a gigabyte that is quantised while it loads is also written, quantised, to the cache
    folder ($SPECDEC_CACHE, else ~/.cache/specdec) and mapped from there: the next start takes seconds. So is a smaller
    one whose experts do not fit in memory.

    A warning appears once in a process where weights in blocks are on the CPU and their native kernels are missing,
    stale or broken, and where a model is on a CUDA device and Triton's kernels cannot compute there; and at each load
    where Triton's interpreter computes.

    Raises:
        ValueError: nothing is at `name_or_path`, the architecture is not supported, the file is damaged, or tensors
            are missing, surplus or misshapen; an adapter does not fit; the memory budget is too small; an argument of
            `from_pretrained`, such as `device_map`: the message says what to write instead.
    """
    for name in foreign:
        if name in _INSTEAD:
            raise ValueError(f"load() takes no {name}; {_INSTEAD[name]}")
        known = did_you_mean(name, inspect.signature(load).parameters)
        raise TypeError(f"load() got an unexpected keyword argument {name!r}.{known}")
    where = resolve_device(device)
    kind = _dtype(dtype, where)
    proposer = resolve_drafter(drafter)  # before the minutes that a large model takes: a wrong name fails at once
    kept = None if kv_dtype is None else _kv_dtype(kv_dtype, where)
    draft = draft_spec(proposer)
    adapters = adapter_files(adapter)
    budget = None if memory_budget is None else MemoryBudget(parse_bytes(memory_budget), drafter, draft)
    path = model_path(name_or_path)
    decoder, config, generation_config = load_decoder(path, kind, where, quantize, kept, budget, adapters)
    decoder.path = path
    kernels.meet_stores(where, lambda: decoder.new_cache().views, decoder.dtype)
    if (reason := kernels.missing(where)) and (where.type != "cpu" or _in_blocks(decoder)):
        _warn_of_slowness(reason, where.type)
    if kernels.interpreted(where):
        warnings.warn(_INTERPRETED, stacklevel=2)
    model = SpecdecForCausalLM(decoder, config, generation_config, proposer, conversations_of(decoder, draft))
    kept_file = None
    if remember and proposer.max_draft:
        kept_file = learned_file(decoder, proposer, drafter_identity(drafter, decoder))
    if kept_file is not None:
        kept_file.read_into(model.lengths)
        weakref.finalize(model, kept_file.write, model.lengths)  # also when the program ends
    with turn_to_compute(), bind_drafter(proposer, decoder):
        calibrate(model.lengths, decoder, proposer)
    return model


def _in_blocks(decoder: Decoder) -> bool:
    return any(layer.down.weight.packed is not None for layer in decoder.layers)


@cache
def _warn_of_slowness(reason: str, device: str) -> None:
    # eval.kernels prints the time of a product; with SPECDEC_KERNELS=reference, the time without native kernels.
    said = "quantised weights run on plain torch, a hundred times slower than on the native kernels, or worse"
    if device != "cpu":
        said = f"plain torch computes on {device}: drafting may change a text there where two tokens nearly tie"
    warnings.warn(f"{said}: {reason}", stacklevel=3)


def load_decoder(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = None,
    kv_dtype: torch.dtype | None = None,
    budget: MemoryBudget | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> tuple[Decoder, Any, GenerationConfig]:
    """Return the decoder, config and generation config of a .gguf file or a Hugging Face folder. `adapters`: files of
    adapters by name, the default first.

    Raises ValueError, naming the model's file or the adapter's, as `load` does.
    """
    adapters = adapters or {}
    spec, source, config, generation_config = open_checkpoint(path)
    added = check_adapters(adapters, spec)  # before the minutes that a large model takes
    with naming(path):
        decoder = _read(path, spec, source, dtype, device, quantize, kv_dtype, budget, added)
    add_adapters(decoder, adapters)
    return decoder, config, generation_config


def _read(
    path: Path,
    spec: DecoderSpec,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize,
    kv_dtype: torch.dtype | None,
    budget: MemoryBudget | None,
    added: int,
) -> Decoder:
    """Return the decoder of `spec` with the weights of `source`, which is the checkpoint at `path`. `added`: bytes of
    the adapters that come with it."""
    room = None if budget is None else budget.room(spec, source, quantize, dtype, kv_dtype or dtype, added, device)
    limit = None  # on a GPU all experts are in its memory
    if device.type == "cpu":
        limit = room.experts if room is not None else experts_in_free_memory(spec, source, quantize, dtype)
    folder, packed = safetensors_of(source.checkpoint), None
    changes = folder is not None and quantize != "none" and (quantize is not None or bool(folder.formats))
    if folder is not None and changes and (limit is not None or folder.nbytes >= quantized.LEAST):
        packed = quantized.load_or_quantize(path, spec, source, quantize, dtype, progress_bar)
    if packed is not None:
        return assemble(spec, quantized.PackedReader(packed, dtype, device, source, limit), kv_dtype, room)
    pages = quantized.expert_pages(path, spec, source, quantize, dtype, device, progress_bar, limit)
    with progress_bar(f"loading {path.name}", len(expected_tensors(spec))) as advance:
        return build_decoder(
            spec,
            source,
            dtype=dtype,
            device=device,
            quantize=quantize,
            progress=lambda _: advance(1),
            kv_dtype=kv_dtype,
            room=room,
            pages=pages,
        )


@dataclass(frozen=True)
class MemoryBudget:
    """Describe the bytes that this process may take, with a model and `drafter` in it, and the caches of the model
    `draft`: of the machine's memory, or of the GPU's where the model is on one."""

    total: int
    drafter: DrafterLike
    draft: DecoderSpec | None = None

    def room(
        self,
        spec: DecoderSpec,
        source: Source,
        quantize: Quantize,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        adapters: int,
        device: torch.device,
    ) -> MemoryLimits:
        """Return the memory limits that the budget leaves for texts, beside adapters of so many bytes. Raises
        ValueError when it leaves too little."""
        weights = loaded_bytes(spec, source, quantize, dtype)
        blocks = weights < dtype.itemsize * sum(map(math.prod, expected_tensors(spec).values()))
        picture = 0 if spec.media is None else LARGEST_PICTURE
        experts = expert_bytes(spec, source, quantize, dtype) if device.type == "cpu" else 0
        planner = Planner(
            spec,
            weights,
            self._drafter(source, dtype, blocks),
            program_bytes(device),
            dtype,
            picture,
            experts=experts,
            draft=self.draft,
            adapters=adapters,
            of_program="CUDA's context" if device.type == "cuda" else PROGRAM,
        )
        return planner.room(self.total, str(kv_dtype).removeprefix("torch."))

    def _drafter(self, source: Source, dtype: torch.dtype, quantized: bool) -> int:
        return drafter_bytes(self.drafter, dtype, quantized, source.checkpoint.path)


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    return dtype


def _kv_dtype(kept: torch.dtype | str, device: torch.device) -> torch.dtype:
    if kept in (torch.int8, "int8"):
        return torch.int8
    try:
        return _dtype(kept, device)
    except ValueError:
        raise ValueError(f"kv_dtype must be 'float32', 'bfloat16', 'float16' or 'int8', got {kept!r}") from None
