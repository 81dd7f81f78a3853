"""Ollama's store on this disk: manifests by name, blobs by hash.

What: `ollama_path` turns ollama:NAME:TAG into the file of the model; `layers_beside` gives the other files of a blob's
manifests; `models_in_store` lists what is there. Why by hand: Ollama need not run, and nothing is copied. Source of the
layout: https://github.com/ollama/ollama (types/model, manifest). Left out: fetching, which `ollama pull` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from specdec.util.text import did_you_mean
from specdec.weights.metadata import Values, naming, quote, read_object

SCHEME = "ollama:"
_REGISTRY, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_MODEL = "application/vnd.ollama.image.model"
_GGUF = (_MODEL, "application/vnd.ollama.image.projector", "application/vnd.ollama.image.draft")
_PART = re.compile(r"[A-Za-z0-9][\w.-]*")
_BLOB = re.compile(r"sha256-[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def store() -> Path:
    """Return the folder of Ollama's models: $OLLAMA_MODELS, else the user's, else the one of the service on Linux."""
    if own := os.environ.get("OLLAMA_MODELS"):
        return Path(own)
    users = Path(os.path.expanduser("~/.ollama/models"))
    service = Path("/usr/share/ollama/.ollama/models")
    return service if not users.is_dir() and service.is_dir() else users


def ollama_path(name: str) -> Path:
    """Return the file of the model `name`, ollama:NAME or ollama:NAME:TAG.

    Raises ValueError when there is no such model here, or its file is not whole.
    """
    manifest = _manifest(name)
    if not manifest.is_file():
        known = [f"{SCHEME}{known}" for known in models_in_store()]
        here = f"; here are {', '.join(known)}" if known else "; the store is empty"
        raise ValueError(
            f"{name}: there is no such model in Ollama's store {store()}.{did_you_mean(name, known)} Fetch it with "
            f"`ollama pull {name.removeprefix(SCHEME)}`{here}"
        )
    with naming(manifest):
        for kind, blob, size in _layers(manifest):
            if kind == _MODEL:
                _check(blob, size, name)
                return blob
    raise ValueError(f"{manifest}: lists no model; fetch it again with `ollama pull {name.removeprefix(SCHEME)}`")


def layers_beside(blob: Path) -> list[Path] | None:
    """Return the other GGUF files of the models that have the file `blob`; None where `blob` is none of Ollama's."""
    if blob.parent.name != "blobs" or not _BLOB.fullmatch(blob.name):
        return None
    found = dict[Path, None]()
    for manifest in _manifests(blob.parent.parent / "manifests"):
        try:
            layers = [path for kind, path, _ in _layers(manifest) if kind in _GGUF]
        except ValueError:
            continue  # another model's manifest is damaged
        if blob.name in {path.name for path in layers}:
            found.update(dict.fromkeys(path for path in layers if path.name != blob.name and path.is_file()))
    return list(found)


def models_in_store() -> dict[str, Path]:
    """Return the file of every model in the store whose file is there, by the model's NAME:TAG."""
    root, found = store() / "manifests", {}
    for manifest in _manifests(root):
        parts = manifest.relative_to(root).parts
        if len(parts) != 4:
            continue
        registry, namespace, model, tag = parts
        name = f"{model}:{tag}" if namespace == _NAMESPACE else f"{namespace}/{model}:{tag}"
        try:
            for kind, blob, size in _layers(manifest):
                if kind == _MODEL and blob.is_file() and blob.stat().st_size == size:
                    found[name if registry == _REGISTRY else f"{registry}/{name}"] = blob
        except (ValueError, OSError):
            continue
    return found


def _manifest(name: str) -> Path:
    whole = name.removeprefix(SCHEME)
    path, _, tag = whole.rpartition(":") if ":" in whole else (whole, "", _TAG)
    parts = path.split("/")
    parts = [*(_REGISTRY, _NAMESPACE)[: max(0, 3 - len(parts))], *parts]
    if len(parts) != 3 or not all(_PART.fullmatch(part) for part in (*parts, tag)):
        raise ValueError(f"{name}: name a model of Ollama like ollama:gemma4:12b or ollama:hf.co/owner/name:Q4_0")
    return store().joinpath("manifests", *parts, tag)


def _manifests(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.glob("*/*/*/*")) if path.is_file())


def _layers(manifest: Path) -> list[tuple[str, Path, int]]:
    """Return kind, file and size of every layer. Raises ValueError when the manifest is damaged."""
    found = []
    for layer in Values(read_object(manifest)).sequence("layers"):
        values = Values(layer)
        digest = values.text("digest")
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"lists {quote(digest)}, which is no hash; fetch it again")
        blobs = _root(manifest) / "blobs"
        found.append((values.text("mediaType"), blobs / digest.replace(":", "-"), values.whole("size", high=1 << 50)))
    return found


def _root(manifest: Path) -> Path:
    return manifest.parents[4]


def _check(blob: Path, size: int, name: str) -> None:
    if not blob.is_file() or blob.stat().st_size != size:
        raise ValueError(
            f"{blob}: is not there as a whole ({size} bytes); fetch it again with `ollama pull "
            f"{name.removeprefix(SCHEME)}`"
        )
