"""Repositories of a hub with a model, its drafter and its embedder, as small files that say what they are."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.support.stores.hub import Hub

UNSLOTH, TWO, SAFE = "unsloth/gemma-4-12b-it-GGUF", "me/two", "google/gemma-4-12B-it"


def small(folder: Path, architecture: str, seed: int = 0) -> bytes:
    """The bytes of a GGUF file of this architecture, which differ by `seed`."""
    path = folder / "made.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("w", np.full((4, 2048), seed, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def fetched(hub: Hub) -> set[str]:
    return {*hub.sent}
