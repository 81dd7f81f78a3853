"""Small GGUF files of every kind, and Ollama's store with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np

MODEL, PROJECTOR = "application/vnd.ollama.image.model", "application/vnd.ollama.image.projector"


def write_kind(path: Path, architecture: str, kind: str | None = None, seed: int = 0) -> Path:
    """A file with nothing but a tensor, and what says of which kind it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(200)])
    writer.add_tensor("w", np.full((2, 32), seed, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put_in_store(store: Path, name: str, files: dict[str, Path | bytes]) -> dict[str, Path]:
    """Put `files`, contents by the media types of layers, into Ollama's `store`; `name`: the manifest's path."""
    layers, blobs = [], {}
    for kind, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        blob = store / "blobs" / f"sha256-{digest}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        layers.append({"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)})
        blobs[kind] = blob
    manifest = store / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return blobs
