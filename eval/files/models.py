"""`run.py models`, `show`, `pull` and `remove`: the models on this disk, one of them, fetching one, deleting one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from eval.cli.output import check_writable, put_record
from eval.files.listing import POSITIONS, Here, beside, memory_of, models_here, needs_of, quantize_of
from eval.files.removal import files_of
from specdec.memory.plan import program_bytes
from specdec.memory.system import available_bytes
from specdec.open import open_checkpoint
from specdec.util.terminal import Terminal
from specdec.util.text import did_you_mean
from specdec.weights.gguf.blocks import BLOCKS, FLOATS
from specdec.weights.gguf.floats import name_of
from specdec.weights.gguf.split import read_parts
from specdec.weights.hub.folder import companions
from specdec.weights.hub.paths import model_path
from specdec.weights.metadata import one_line
from specdec.weights.safetensors import SafetensorsCheckpoint


def models(json_file: Path | None) -> int:
    """Print the models on this disk with their sizes and what each would take; return the exit code."""
    check_writable(json_file)
    table, records = _table("model", "kept by", "GB", "in memory", "beside it"), []
    program = program_bytes()
    for here in models_here():
        record = _about(here, program)
        records.append(record)
        takes = f"{record['memory'] / 1e9:.2f}" if "memory" in record else "not supported"
        words = "(a drafter)" if record["kind"] == "drafter" else ", ".join(record["beside"])
        table.add_row(one_line(here.name), here.keeper, f"{here.nbytes / 1e9:.2f}", takes, words)
    console = Terminal(highlight=False)
    if records:
        console.print(table)
        console.print(
            f"in memory: weights, the drafter beside them, a context of {POSITIONS:,}, workspace and Python; folders "
            f"of floats with --quantize int4. {available_bytes() / 1e9:.1f} GB are free. `show NAME` says more",
            soft_wrap=True,
        )
    else:
        console.print("no models here yet; `pull NAME` fetches one, and every command does on its first use")
    put_record(json_file, {"command": "models", "models": records})
    return 0


def _about(here: Here, program: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": here.name,
        "kept_by": here.keeper,
        "path": str(here.path),
        "bytes": here.nbytes,
        "kind": "drafter" if here.is_drafter else "model",
        "beside": [] if here.is_drafter else beside(here.path),
    }
    try:
        return {**record, "memory": memory_of(here, program)}
    except ValueError as error:
        return {**record, "reason": str(error)}


def show(name: str, json_file: Path | None) -> int:
    """Print what the model `name` is, what its types of weights become, what it takes and what lies beside it; return
    the exit code.

    Raises ValueError: nothing is there, or it is no model that is supported.
    """
    check_writable(json_file)
    program = program_bytes()  # before a vocabulary is read, which does not stay
    path = model_path(name)
    here = Here(name, "", path)
    spec, *_ = open_checkpoint(path)
    needs, found = needs_of(path, quantize_of(path), program), companions(path)
    console = Terminal(highlight=False)
    console.print(str(path), soft_wrap=True)
    console.print(
        f"{spec.model_type}: {len(spec.layers)} layers, {spec.vocab_size:,} tokens, {spec.max_positions:,} positions; "
        f"{here.nbytes / 1e9:.2f} GB in {len(here.files)} file{'s' * (len(here.files) != 1)}",
        soft_wrap=True,
    )
    types = _types(path) if path.is_file() else _formats(path)
    if types:
        table = _table("type", "tensors", "GB", "becomes")
        for kind in types:
            table.add_row(kind["type"], str(kind["tensors"]), f"{kind['bytes'] / 1e9:.3f}", kind["becomes"])
        console.print(table)
    for word, those in (("drafter", found.drafters), ("embedder", found.embedders)):
        for file in those:
            console.print(f"{word}: {file} ({file.stat().st_size / 1e9:.2f} GB)", soft_wrap=True)
    experts = f" experts {needs.experts / 1e9:.2f}, which stay in a file where memory is short," * bool(needs.experts)
    console.print(
        f"takes {needs.total / 1e9:.2f} GB: weights {needs.weights / 1e9:.2f},{experts} "
        f"drafter {needs.drafter / 1e9:.2f}, {needs.positions:,} positions {needs.cache / 1e9:.2f}, "
        f"workspace {needs.workspace / 1e9:.2f}, Python {needs.program / 1e9:.2f}"
        f"{' (with --quantize int4)' if path.is_dir() else ''}; run.py plan knows other lengths",
        soft_wrap=True,
    )
    files = {"drafters": [str(file) for file in found.drafters], "embedders": [str(file) for file in found.embedders]}
    record = {"command": "show", "name": name, "path": str(path), "bytes": here.nbytes, "types": types}
    put_record(json_file, {**record, "model_type": spec.model_type, **files, "needs": needs.to_dict()})
    return 0


def _types(path: Path) -> list[dict[str, Any]]:
    """Return the types of a file's tensors, those with the most bytes first, and what each becomes."""
    tensors, count, size = read_parts(path).tensors, Counter[int](), Counter[int]()
    for info in tensors.values():
        count[info.type] += 1
        size[info.type] += info.nbytes
    return [
        {"type": name_of(kind), "tensors": count[kind], "bytes": nbytes, "becomes": _becomes(kind)}
        for kind, nbytes in size.most_common()
    ]


def _formats(folder: Path) -> list[dict[str, Any]]:
    """Return the formats of a folder's quantised matrices, those with the most bytes first, and what each becomes; and
    the floats that were trained for 4 bits."""
    checkpoint = SafetensorsCheckpoint(folder)
    found = [
        {"type": matrix.format, "tensors": count, "bytes": nbytes, "becomes": matrix.becomes}
        for matrix, count, nbytes in checkpoint.formats
    ]
    if trained := checkpoint.trained:
        becomes = "4 bits with their own steps, with --quantize int4"
        kind = {"type": "floats trained for 4 bits", "tensors": len(trained), "bytes": sum(trained.values())}
        found.append({**kind, "becomes": becomes})
    return found


def _becomes(kind: int) -> str:
    if kind in FLOATS:
        return "floats"
    ours = BLOCKS.get(kind)
    return "not read" if ours is None else ours.in_words


def pull(name: str, json_file: Path | None) -> int:
    """Fetch the model `name`, with the drafter and the embedder of its repository; return the exit code.

    Raises ValueError: there is no such model, or it cannot be fetched.
    """
    check_writable(json_file)
    path = model_path(name)
    here, found = Here(name, "", path), companions(path)
    console = Terminal(highlight=False)
    console.print(f"{path} ({here.nbytes / 1e9:.2f} GB)", soft_wrap=True)
    others = [*found.drafters[:1], *found.embedders[:1]]
    for file in others:
        console.print(f"{file} ({file.stat().st_size / 1e9:.2f} GB)", soft_wrap=True)
    record = {"command": "pull", "name": name, "path": str(path), "bytes": here.nbytes}
    put_record(json_file, {**record, "beside": [str(file) for file in others]})
    return 0


def remove(name: str, sure: bool) -> int:
    """Delete the files of the model `name` from the cache that fetched it; ask first, unless `sure`. Return the exit
    code.

    Raises ValueError: it is not here, another program keeps it, or nobody can be asked.
    """
    known = [here.name for here in models_here()]
    files = files_of(name)
    if not files:
        raise ValueError(f"{name}: is in no cache here.{did_you_mean(name, known)} `models` lists what is here")
    size = sum(file.stat().st_size for file in {file.resolve() for file in files})
    console = Terminal(highlight=False)
    for file in files:
        console.print(one_line(str(file)), soft_wrap=True)
    if not sure:
        if not sys.stdin.isatty():
            raise ValueError(f"remove {name}: nobody is there to be asked; say --yes")
        answer = input(
            f"delete {'it' if len(files) == 1 else f'these {len(files)} files'} ({size / 1e9:.2f} GB)? [y/N] "
        )
        if answer.strip().lower() not in ("y", "yes"):
            return 0
    for file in files:
        whole = file.resolve()
        file.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)  # what a link of the hub's cache leads to
    console.print(f"deleted {size / 1e9:.2f} GB")
    return 0


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in ("GB", "in memory", "tensors") else "left", overflow="fold")
    return table
