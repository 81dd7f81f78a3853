"""An adapter of a decoder, and those that a decoder has, by name.

What: an `Adapter` is the decoder's layers once more, over the same weights, with low-rank parts in their matrices.
Texts with different adapters, or without one, share the passes of one decoder: a text's cache says which adapter it is
of, because keys and values depend on it. Left out: merging an adapter into the weights, which would round them anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from specdec.model.stack import AdaptedLayers, Linear
from specdec.util.atomic import user_path
from specdec.weights.hub.paths import adapter_path
from specdec.weights.tensors import Weight

AdapterLike = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None

_LONGEST = 64  # characters of a name
NONE = "none"  # what a request asks for to have no adapter, and so no adapter's name
PLAIN = ""  # the name in caches of texts without an adapter


@dataclass(frozen=True, eq=False)
class Adapter:
    """Hold what an adapter called `name` makes of a decoder: its layers, and what else it replaces (None: nothing).

    `identity`: a hash of all that it changes. `nbytes`: of what it adds to the decoder.
    """

    name: str
    identity: str
    layers: AdaptedLayers
    nbytes: int
    head: Linear | None = None
    embedding: Weight | None = None
    per_layer_projection: Linear | None = None


@dataclass
class Adapters:
    """Hold the adapters of a decoder, in the order in which they were added. `default`: the name of the one for texts
    that ask for none, "" for none."""

    default: str = PLAIN
    _known: dict[str, Adapter] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    @property
    def names(self) -> tuple[str, ...]:
        """Return their names."""
        return (*self._known,)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all of them."""
        return sum(adapter.nbytes for adapter in self)

    def add(self, adapter: Adapter) -> None:
        """Take `adapter` in. Raises ValueError where its name is taken, or is no name."""
        check_name(adapter.name)
        if adapter.name in self._known:
            raise ValueError(f"there is an adapter {adapter.name!r} already; give this one another name")
        self._known[adapter.name] = adapter

    def resolve(self, name: str | None) -> str:
        """Return the name in caches for what a request asks for: None is the default, "none" is no adapter.

        Raises ValueError, with the names that there are, for another name.
        """
        if name is None:
            return self.default
        if name in (NONE, PLAIN):
            return PLAIN
        if name not in self._known:
            known = f"there are: {', '.join((*self._known, NONE))}" if self._known else "the model has none"
            raise ValueError(f"there is no adapter {name!r}; {known}")
        return name

    def of(self, name: str) -> Adapter | None:
        """Return the adapter whose name a cache has; None where the cache is of a text without an adapter."""
        return self._known[name] if name else None


def name_of(path: Path) -> str:
    """Return the name of the adapter at `path` where nobody gave one: its folder's or file's, in characters that names
    have. For a path like ".." it is that of the folder that the path leads to."""
    path = Path(os.path.abspath(user_path(path)))
    stem = path.parent.name if path.name.startswith("adapter_") else path.stem if path.suffix == ".gguf" else path.name
    return re.sub(r"[^\w.+-]+", "-", stem)[:_LONGEST]


def named_adapters(adapter: AdapterLike) -> dict[str, Path]:
    """Return the paths that `adapter` names, by name. Raises ValueError for a name that is none, and for no path."""
    if adapter is None:
        return {}
    if adapter == "":
        raise ValueError("the adapter's path is empty; name a PEFT folder or a .gguf file")
    if isinstance(adapter, (str, os.PathLike)):
        adapter = {name_of(Path(adapter)): adapter}
    if not isinstance(adapter, Mapping):
        raise ValueError(f"adapter must be a path, or names with their paths, not {adapter!r}")
    for name, path in adapter.items():
        if not isinstance(name, str) or not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"adapter must be a path, or names with their paths, not {name!r}: {path!r}")
        check_name(name)
    return {name: user_path(path) for name, path in adapter.items()}


def adapter_files(adapter: AdapterLike) -> dict[str, Path]:
    """Return the files and folders that `adapter` names, by name, those of the hub fetched. Raises ValueError as
    `named_adapters` does, FetchError where fetching fails."""
    return {name: adapter_path(path) for name, path in named_adapters(adapter).items()}


def check_name(name: str) -> None:
    """Raise a ValueError where `name` cannot be an adapter's."""
    if not name or not name.isprintable() or any(c in name for c in "=:/\\, ") or name == NONE or len(name) > _LONGEST:
        raise ValueError(
            f"{name[:80]!r} cannot be the name of an adapter: give it a short one without spaces, '=', ':', ',' and "
            f"slashes, and not {NONE!r}"
        )
