"""What models are on this disk, under the names that `--model` takes, and what each would take in memory.

What: `models_here` walks through the caches of this project and of the hub and through the stores of Ollama, LM Studio
and llama.cpp. `needs_of` reads headers alone. Left out: folders that no program keeps; name them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from drafter.files.checkpoint import stored_bytes
from drafter.files.find import heads_in
from specdec.drafting.registry import drafter_bytes
from specdec.memory.plan import Needs, Planner, expert_bytes, loaded_bytes
from specdec.model.build import Quantize
from specdec.open import open_checkpoint
from specdec.weights.gguf.kind import kind_of
from specdec.weights.gguf.split import part_names
from specdec.weights.hub.folder import companions, sort_files, tag_of
from specdec.weights.hub.ollama import SCHEME, models_in_store
from specdec.weights.hub.paths import NAMED_MODELS, cache_folder
from specdec.weights.hub.repository import cached_repositories
from specdec.weights.hub.stores import store_files

POSITIONS = 4096  # of the context whose needs are shown


class Here(NamedTuple):
    """Describe a model or drafter on this disk: the name that commands take, who keeps it, and its .gguf file or
    folder."""

    name: str
    keeper: str
    path: Path

    @property
    def is_drafter(self) -> bool:
        """Tell whether it is a drafter, for `--drafter`."""
        if self.path.is_dir():
            return heads_in(self.path.parent).count(self.path) > 0
        return kind_of(self.path) == "drafter"

    @property
    def files(self) -> list[Path]:
        """Return the files of its weights."""
        if self.path.is_dir():
            return sorted(self.path.glob("*.safetensors"))
        names = part_names(self.path.name) or [self.path.name]
        return [path for name in names if (path := self.path.with_name(name)).is_file()]

    @property
    def nbytes(self) -> int:
        """Return the bytes of those files."""
        return sum(path.stat().st_size for path in self.files)


def models_here() -> Iterator[Here]:
    """Yield the models of all stores, in the order of their keepers."""
    try:
        folder: Path | None = cache_folder()
    except OSError:
        folder = None
    for name, model in NAMED_MODELS.items():
        if folder is not None and (folder / model.file).is_file():
            yield Here(name, "specdec", folder / model.file)
    for name, files in cached_repositories():
        yield from _of_repository(name, files)
    for name, path in models_in_store().items():
        yield Here(f"{SCHEME}{name}", "Ollama", path)
    paths: dict[str, list[Path]] = {}
    for keeper, path in store_files():
        paths.setdefault(keeper, []).append(path)
    for keeper, those in paths.items():
        names = [path.name for path in those]
        for path in _models_and_drafters(those):
            yield Here(path.name if names.count(path.name) == 1 else str(path), keeper, path)


def _of_repository(name: str, files: list[Path]) -> Iterator[Here]:
    """Yield what a repository has in the hub's cache: its safetensors, and each of its .gguf files but embedders."""
    if any(file.suffix == ".safetensors" and (file.parent / "config.json").is_file() for file in files):
        folder = next(file.parent for file in files if file.suffix == ".safetensors")
        yield Here(name, "hub", folder)
    models = _models_and_drafters(files)
    tags = [tag_of(path.name) for path in models if kind_of(path) == "model"]
    for path in models:
        snapshot = next(parent for parent in path.parents if parent.parent.name == "snapshots")
        tag = tag_of(path.name) if kind_of(path) == "model" else None
        one = tag is not None and tags.count(tag) == 1
        yield Here(f"{name}:{tag}" if one else f"{name}/{path.relative_to(snapshot).as_posix()}", "hub", path)


def _models_and_drafters(files: Iterable[Path]) -> list[Path]:
    found = sort_files(files)
    return [*found.models, *found.drafters]


def needs_of(path: Path, quantize: Quantize, program: int) -> Needs:
    """Return what the model at `path` takes, with the drafter beside it, for a context of `POSITIONS`, or for the
    longest that it has. `program`: bytes of Python and its libraries.

    Raises ValueError when it is damaged, or no model that is supported.
    """
    spec, source, *_ = open_checkpoint(path)
    dtype = torch.float32
    weights = loaded_bytes(spec, source, quantize, dtype)
    drafter = drafter_bytes("auto", dtype, quantize is not None or path.is_file(), path)
    experts = expert_bytes(spec, source, quantize, dtype)
    return Planner(spec, weights, drafter, program, dtype, experts=experts).needs(min(POSITIONS, spec.max_positions))


def memory_of(here: Here, program: int) -> int:
    """Return the bytes that a model takes in all, or a drafter beside a model in blocks.

    Raises ValueError as `needs_of` does.
    """
    if here.is_drafter:
        return stored_bytes(here.path, torch.float32, True)
    return needs_of(here.path, quantize_of(here.path), program).total


def quantize_of(path: Path) -> Quantize:
    """Return how a model is loaded where memory counts: a folder of floats in 4 bits, a .gguf file as it is."""
    return "int4" if path.is_dir() else None


def beside(path: Path) -> list[str]:
    """Return words for what lies beside a model."""
    found = companions(path)
    return [word for word, files in (("drafter", found.drafters), ("embedder", found.embedders)) if files]
