"""`run.py plan`: the memory that a model would take, and the longest context that fits, before anything is loaded.

The model is a name, a file or a folder, as for every command; only its headers are read. Or it is one of the shapes in
`eval/synthetic/configs/`, which need no file of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from drafter.config import assistant_spec, extra_tensors
from eval.cli.names import full_size_names
from eval.cli.output import DIFFERS, check_writable, put_record
from eval.cli.provenance import machine
from eval.synthetic.full_size import full_size_config, full_size_drafter
from specdec.drafting.registry import draft_spec, drafter_bytes, resolve_drafter
from specdec.memory.plan import KV_DTYPES, Needs, Planner, expert_bytes, loaded_bytes, program_bytes, weight_bytes
from specdec.memory.system import available_bytes
from specdec.memory.video import video_memory
from specdec.model.adapters.build import check_adapters
from specdec.model.build import Quantize
from specdec.model.families import decoder_spec
from specdec.model.names import PER_LAYER_TABLE, expected_tensors, is_expert_matrix
from specdec.model.spec import DecoderSpec
from specdec.open import open_checkpoint
from specdec.util.terminal import Terminal
from specdec.weights.hub.paths import adapter_path, model_path


@dataclass(frozen=True)
class Asked:
    """Keep the options of a `run.py plan`; sizes in bytes."""

    model: str
    drafter: str
    quantize: Quantize
    dtype: torch.dtype
    context: int
    budget: int | None
    kv_dtype: str
    picture: int = 0  # soft tokens
    frames: int = 0
    adapters: tuple[str, ...] = ()  # folders, files, hub ids
    on: str = "cpu"  # the device in whose memory the model would be; a GPU need not be here

    @property
    def device(self) -> torch.device:
        """Return the device `on`."""
        return torch.device(self.on)


def plan(asked: Asked, json_file: Path | None) -> int:
    """Print the memory that is needed and the context that fits; return the exit code, 1 when it exceeds the budget.

    Raises ValueError: the model or the drafter is not readable, the context is longer than the model's, or the budget
    is that of a GPU that is not here.
    """
    check_writable(json_file)
    program, free = program_bytes(asked.device), _free(asked)
    planner = plan_memory(asked, program)
    spec = planner.spec
    # Free memory does not count this program, which is in memory already: on a GPU its context, once it was asked.
    budget = asked.budget if asked.budget is not None else (free or 0) + program
    needs = planner.needs(asked.context, asked.kv_dtype, budget)
    longest = {name: planner.longest(budget, name) for name in KV_DTYPES}
    fits = needs.total <= budget
    console = Terminal(highlight=False)
    console.print(_table(needs, planner.experts, asked.device.type))
    source = "the budget" if asked.budget is not None else "what is free"
    verdict = "fits into" if fits else "does not fit into"
    lacking = "" if fits else f": {(needs.total - budget) / 1e9:.2f} GB are missing"
    console.print(f"{verdict} {source}, {budget / 1e9:.2f} GB{lacking}")
    if not fits:
        console.print(_advice(asked, program, budget, needs.total))
    console.print(_longest(longest, spec.max_positions))
    record: dict[str, Any] = {
        "command": "plan",
        "model": asked.model,
        **needs.to_dict(),
        "experts_in_file": planner.experts - needs.experts,
        "budget": budget,
        "fits": fits,
        "longest_context": longest,
        "available_memory": free,
        "device": asked.device.type,
        **machine(torch.device("cpu") if video_memory(asked.device) is None else asked.device),
    }
    put_record(json_file, record)
    return 0 if fits else DIFFERS


def _free(asked: Asked) -> int | None:
    """Return the bytes that are free in the memory of the device; None where it is not here, and its size was given."""
    if asked.device.type != "cuda":
        return available_bytes()
    if (video := video_memory(asked.device)) is None and asked.budget is None:
        which = "no CUDA device is" if asked.device.index is None else f"{asked.device} is not"
        raise ValueError(f"{which} here to be asked: give the size of its memory, like --budget 16GB")
    return None if video is None else video.free


def _advice(asked: Asked, program: int, budget: int, least: int) -> str:
    """Say which options would make it fit, those first that cost least, or that none would. `least`: the bytes that it
    takes as asked for."""
    words = dict[str, str]()
    changes: list[tuple[str, str, Callable[[Asked], Asked]]] = [
        ("--kv-dtype", "int8", lambda one: replace(one, kv_dtype="int8")),
        ("--quantize", "int4", lambda one: replace(one, quantize="int4")),
        ("--drafter", "none", lambda one: replace(one, drafter="none")),
        ("--quantize", "int4-all", lambda one: replace(one, quantize="int4-all")),
    ]
    for option, word, change in changes:
        other = change(asked)
        try:
            total = plan_memory(other, program).needs(other.context, other.kv_dtype, budget).total
        except ValueError:  # a file that is quantised already takes no other quantisation
            continue
        if total >= least:
            continue
        asked, least, words[option] = other, total, word
        if total <= budget:
            break
    found = " ".join(f"{option} {word}" for option, word in words.items())
    if least <= budget:
        return f"would fit with {found}: {least / 1e9:.2f} GB"
    if not words:
        return "shorten --context, or take a smaller model: no --kv-dtype, --quantize or --drafter takes less"
    return f"not even with {found}: {least / 1e9:.2f} GB; shorten --context, or take a smaller model"


def plan_memory(asked: Asked, program: int) -> Planner:
    """Return the planner for the model and the drafter of `asked`. Raises ValueError as `plan` does."""
    spec, weights, experts, path = _model(asked)
    if asked.context > spec.max_positions:
        raise ValueError(f"{asked.context:,} positions; {asked.model} has a context of {spec.max_positions:,}")
    if (asked.picture or asked.frames) and (spec.media is None or spec.media.vision is None):
        raise ValueError(f"{asked.model} takes no pictures; leave --picture and --frames out")
    experts = 0 if asked.device.type == "cuda" else experts  # a GPU has all of them in its memory
    drafter, draft = _drafter(asked, spec, path), draft_spec(resolve_drafter(asked.drafter))
    added = check_adapters({one: adapter_path(one) for one in asked.adapters}, spec)
    media = (asked.picture, asked.frames)
    return Planner(spec, weights, drafter, program, asked.dtype, *media, experts=experts, draft=draft, adapters=added)


def _model(asked: Asked) -> tuple[DecoderSpec, int, int, Path | None]:
    """Return the decoder that would be loaded, the bytes of its weights, of which so many are experts, and its file or
    folder; None: a shape alone."""
    if asked.model in full_size_names():
        spec = decoder_spec(full_size_config(asked.model))
        quantize = asked.quantize or "int4"
        shapes = {name: shape for name, shape in expected_tensors(spec).items() if name != PER_LAYER_TABLE}
        experts = {name: shape for name, shape in shapes.items() if is_expert_matrix(name)}
        of_all, of_experts = (weight_bytes(each, quantize, asked.dtype) for each in (shapes, experts))
        return spec, of_all, of_experts, None
    path = model_path(asked.model)
    spec, source, _, _ = open_checkpoint(path)
    stored = (spec, source, asked.quantize, asked.dtype)
    return spec, loaded_bytes(*stored), expert_bytes(*stored), path


def _drafter(asked: Asked, spec: DecoderSpec, path: Path | None) -> int:
    """Return the bytes of the drafter's weights: of a head or model that is named, of the published assistant of a
    shape, of the drafter beside a model or a bundled head."""
    if asked.drafter == "auto" and asked.model in full_size_names():
        config = full_size_drafter(asked.model)
        if config is None:
            return 0
        head = assistant_spec(config, spec)
        return weight_bytes({**expected_tensors(head.text), **extra_tensors(head)}, "int8", asked.dtype)
    quantized = asked.quantize is not None or (path is not None and path.is_file())
    return drafter_bytes(asked.drafter, asked.dtype, quantized, path)


def _table(needs: Needs, experts: int, device: str) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column("GB", justify="right")
    for name, value in (
        ("weights", needs.weights),
        *([(_experts(needs, experts), needs.experts)] if experts else []),
        ("drafter", needs.drafter),
        *([("adapters", needs.adapters)] if needs.adapters else []),
        (f"cache of {needs.positions:,} positions, {needs.kv_dtype}", needs.cache),
        *([("the drafter's cache", needs.draft_cache)] if needs.draft_cache else []),
        ("workspace of a pass", needs.workspace),
        ("CUDA's context (not measured)" if device == "cuda" else "Python and its libraries", needs.program),
        *([("pictures and video", needs.media)] if needs.media else []),
        ("in all", needs.total),
    ):
        table.add_row(name, "<0.01" if 0 < value < 5e6 else f"{value / 1e9:.2f}")
    return table


def _experts(needs: Needs, experts: int) -> str:
    left = experts - needs.experts
    return "experts" if not left else f"experts, {left / 1e9:.2f} GB more stay in a file"


def _longest(longest: dict[str, int], most: int) -> str:
    if len(set(longest.values())) == 1:
        (one,) = set(longest.values())
        found = f"{one:,}{' (all that the model has)' if one == most else ''}" if one else "none"
        return f"longest context that fits, whatever the cache keeps: {found}"
    parts = [
        f"{name} {'does not fit' if not n else f'{n:,}' + (' (all that the model has)' if n == most else '')}"
        for name, n in longest.items()
    ]
    return f"longest context by what the cache keeps: {', '.join(parts)}"
