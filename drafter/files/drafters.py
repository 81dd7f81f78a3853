"""Both sorts of drafters that are read from disk: heads, and models that draft for larger ones.

What: `open_drafter` looks at what a file or folder holds. A head is a drafter of its own kind (`checkpoint.py`);
everything else is a model, which `specdec.load` has to be able to read, and drafts beside suffix matches.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from drafter.config import HEAD_TYPE, MODEL_TYPES
from drafter.files import checkpoint
from drafter.files.find import find_drafter
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.draft_model.draft_model import DraftModel
from specdec.drafting.protocol import Drafter
from specdec.load import load_decoder
from specdec.memory.plan import loaded_bytes
from specdec.model.build import Quantize, Source
from specdec.model.decoder import Decoder
from specdec.model.spec import DecoderSpec
from specdec.open import open_checkpoint
from specdec.weights.gguf.kind import DRAFTERS, kind_of
from specdec.weights.hf_config import CONFIG
from specdec.weights.metadata import read_object


def open_drafter(name_or_path: str | os.PathLike[str]) -> Drafter:
    """Return the drafter of a folder, file or name, not bound to a backbone yet: a head, or suffix matches beside a
    model that drafts.

    A model takes 8 bits beside a backbone in blocks, where its weights are floats; else they stay as they are.

    Raises:
        ValueError: nothing is there, or it is neither a drafter's head nor a model of a family that is read.
    """
    path = find_drafter(name_or_path)
    if not _is_model(path):
        return checkpoint.load_drafter(name_or_path)
    spec, _ = _open(path)

    def build(backbone: Decoder) -> Decoder:
        quantize = _storage(backbone.layers[0].q.weight.packed is not None)
        decoder, *_ = load_decoder(path, backbone.dtype, backbone.device, quantize, backbone.kv_dtype)
        decoder.path = path
        return decoder

    return CompositeDrafter(DraftModel(path, spec, build))


def stored_bytes(name_or_path: str | os.PathLike[str], dtype: torch.dtype, quantized: bool) -> int:
    """Return the bytes that the weights of a drafter take, bound to a backbone in `dtype`, `quantized` or not."""
    path = find_drafter(name_or_path)
    if not _is_model(path):
        return checkpoint.stored_bytes(name_or_path, dtype, quantized)
    spec, source = _open(path)
    return loaded_bytes(spec, source, _storage(quantized), dtype)


def weights_state(name_or_path: str | os.PathLike[str]) -> str:
    """Return names, sizes and times of a drafter's files of weights: other weights have another state."""
    path = find_drafter(name_or_path)
    return checkpoint.files_state(path) if _is_model(path) else checkpoint.weights_state(name_or_path)


def _open(path: Path) -> tuple[DecoderSpec, Source]:
    """Return spec and source of the model at `path`. Raises ValueError: what is there is no drafter of either sort."""
    try:
        spec, source, *_ = open_checkpoint(path)
    except ValueError as error:
        heads = ", ".join((*MODEL_TYPES, HEAD_TYPE, *DRAFTERS))
        raise ValueError(f"{error}; a drafter is a head (of type {heads}) or a model that can be loaded") from error
    return spec, source


def _storage(quantized: bool) -> Quantize:
    return "int8" if quantized else None


def _is_model(path: Path) -> bool:
    """Return whether a file or folder holds a model, and not a drafter's head; who reads heads says what is missing
    where it holds neither."""
    if path.is_file():
        return kind_of(path) == "model"
    try:
        kind = read_object(path / CONFIG).get("model_type")
    except ValueError:
        return False
    return kind not in (*MODEL_TYPES, HEAD_TYPE)
