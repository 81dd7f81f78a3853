"""A head of our own format as a folder: `mtp.gguf` (matrices as 8-bit blocks, Q8_0, vectors as float32) and
`config.json` (sizes, whose head it is, what it was trained on and how it scored).

8 bits because a draft's acceptance is the same there and the file is what a user downloads; GGUF because the backbone's
reader then reads it too. The float weights that training goes on from are kept apart, in its own checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from drafter.spec import HeadConfig
from specdec.kernels import unpack_blocks
from specdec.model.decoder import Decoder
from specdec.weights.tensors import BLOCK, quantize

HEAD_FILE = "mtp.gguf"
ARCHITECTURE = "specdec-mtp"
DRAFT_IDS = "specdec.draft_ids"  # metadata: the backbone's ids of a pruned head's candidates, ascending


def save_head(
    folder: Path,
    config: HeadConfig,
    tensors: Mapping[str, Tensor],
    draft_ids: Tensor | None,
    backbone: Decoder,
    about: Mapping[str, Any],
) -> None:
    """Write a head for `backbone` to `folder`, over an older one if there is one.

    `tensors`: as `Network.tensors()` gives them. `about`: what config.json says besides: "backbone_name", data,
    settings, scores; any JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = write_weights(folder, tensors, draft_ids if config.draft_vocab else None)
    values = {
        **config.to_dict(),
        "backbone": {"fingerprint": backbone.fingerprint, "name": about.get("backbone_name", "unnamed")},
        "weights": weights,
        "provenance": {key: value for key, value in about.items() if key != "backbone_name"},
    }
    temporary = folder / f".config.json.{os.getpid()}"
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "config.json")


def check_weights(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise a ValueError when `mtp.gguf` is not the one that config.json, read as `values`, was written for."""
    if _digest(folder / HEAD_FILE) != values["weights"]:
        raise ValueError(f"{HEAD_FILE} is not the one that config.json was written for")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_weights(folder: Path, tensors: Mapping[str, Tensor], draft_ids: Tensor | None) -> str:
    """Write `tensors` (float, named as transformers would) to `folder`, all or nothing; returns the file's SHA-256."""
    temporary = folder / f".{HEAD_FILE}.{os.getpid()}"
    writer = GGUFWriter(temporary, ARCHITECTURE)
    if draft_ids is not None:
        writer.add_array(DRAFT_IDS, draft_ids.tolist())
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.shape[1] % BLOCK == 0:
            writer.add_tensor(name, q8_0(tensor, name), raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, folder / HEAD_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    return _digest(folder / HEAD_FILE)


def q8_0(tensor: Tensor, name: str) -> npt.NDArray[np.uint8]:
    """A matrix [N, K] as Q8_0 bytes [N, K / 32 * 34]: of every 32 values a float16 scale, then int8 values."""
    values, scale, _ = unpack_blocks(quantize(tensor.float(), "int8", name=name).blocks)
    rows, columns = tensor.shape
    raw = torch.empty(rows, columns // BLOCK, 2 + BLOCK, dtype=torch.uint8)
    raw[..., :2] = scale.flatten().contiguous().view(torch.uint8).view(rows, -1, 2)  # [N * K / 32] -> [N, K / 32, 2]
    raw[..., 2:] = values.view(torch.uint8).view(rows, -1, BLOCK)  # [N, K / 32, 32]
    bytes_: npt.NDArray[np.uint8] = raw.view(rows, -1).numpy()
    return bytes_
