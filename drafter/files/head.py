"""A head of our own format as a folder: `mtp.gguf` (matrices as blocks of 8, 5 or 4 bits, vectors as float32) and
`config.json` (sizes, the backbone's fingerprint, training data and scores).

The matrices are quantised because blocks of few bits hardly change a draft's acceptance, lower its cost, and make the
file that a user downloads small. The file is GGUF because the reader of the backbone's files then reads the head too.
The float weights that training goes on from are in the checkpoints of training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray
from torch import Tensor

from drafter.config import MTPHeadConfig
from specdec.kernels import BLOCK
from specdec.model.decoder import Decoder
from specdec.util.atomic import replacing
from specdec.weights.fit import fit_minimum
from specdec.weights.metadata import Values

HEAD_FILE = "mtp.gguf"
ARCHITECTURE = "specdec-mtp"
STORED = {8: GGMLQuantizationType.Q8_0, 5: GGMLQuantizationType.Q5_1, 4: GGMLQuantizationType.Q4_1}
DRAFT_IDS = "specdec.draft_ids"  # metadata: the backbone's ids of a pruned head's candidates, ascending


def save_head(
    folder: Path,
    config: MTPHeadConfig,
    tensors: Mapping[str, Tensor],
    draft_ids: Tensor | None,
    backbone: Decoder,
    about: Mapping[str, Any],
    bits: int = 8,
) -> None:
    """Write a head for `backbone` to `folder`, over an older head if there is one.

    `tensors`: as `Network.tensors()` gives them. `about`: what config.json says besides: "backbone_name", data,
    settings, scores; any JSON. `bits`: of the head's matrices, one of `STORED`; at 4 only the matrices of the layers
    take 4 bits, the others take 5.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = write_weights(folder, tensors, draft_ids if config.draft_vocab else None, bits)
    values = {
        **config.to_dict(),
        "backbone": {"fingerprint": backbone.fingerprint, "name": about.get("backbone_name", "unnamed")},
        "weights": weights,
        "provenance": {key: value for key, value in about.items() if key != "backbone_name"},
    }
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_weights(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise a ValueError when the hash of `mtp.gguf` is not the one in config.json, read as `values`."""
    if _digest(folder / HEAD_FILE) != Values(values).text("weights"):
        raise ValueError(f"{HEAD_FILE} is not the one that config.json was written for")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_weights(folder: Path, tensors: Mapping[str, Tensor], draft_ids: Tensor | None, bits: int = 8) -> str:
    """Write `tensors` (float, named as transformers would) to `folder`, all or nothing; return the file's SHA-256."""
    with replacing(folder / HEAD_FILE) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        if draft_ids is not None:
            writer.add_array(DRAFT_IDS, draft_ids.tolist())
        for name, tensor in tensors.items():
            own = _bits_of(name, tensor, bits)
            if own is None:
                writer.add_tensor(name, tensor.float().numpy())
                continue
            kind = STORED[own]
            stored = quants.quantize(tensor.float().numpy(), kind) if own == 8 else _blocks(tensor.float(), own)
            writer.add_tensor(name, stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return _digest(folder / HEAD_FILE)


def as_stored(name: str, tensor: Tensor, bits: int) -> Tensor:
    """Return the tensor `name` [...] as a head's file of so many bits gives it back, float32."""
    own = _bits_of(name, tensor, bits)
    if own is None:
        return tensor.float()
    if own == 8:
        stored = quants.quantize(tensor.float().numpy(), STORED[own])
        return torch.from_numpy(quants.dequantize(stored, STORED[own]))
    values, scale, minimum = fit_minimum(tensor.float(), own)
    assert minimum is not None
    blocks = values.float().view(*scale.shape, BLOCK)  # [R, K] -> [R, K / 32, 32]
    return (blocks * scale.float()[..., None] + minimum.float()[..., None]).view(tensor.shape)  # [R, K]


def _bits_of(name: str, tensor: Tensor, bits: int) -> int | None:
    """Return the bits in which a head of `bits` bits stores the tensor `name`; None: as float32."""
    if tensor.dim() != 2 or tensor.shape[1] % BLOCK:
        return None
    # What chooses the token, and what joins the inputs, suffers more from 4 bits than the layers do.
    return 5 if bits == 4 and not name.startswith("layers.") else bits


def _blocks(tensor: Tensor, bits: int) -> NDArray[np.uint8]:
    """Return tensor, float32 [R, K], as Q4_1 or Q5_1: [R, bytes of a row].

    Our own search finds scale and minimum; its error is less than the error of rounding between a block's least and
    greatest value. Layout: ggml's `block_q4_1` and `block_q5_1`: scale, minimum, (the fifth bits,) and nibbles; those
    of the first sixteen values are the low nibbles.
    """
    rows, blocks = tensor.shape[0], tensor.shape[1] // BLOCK
    values, scale, minimum = fit_minimum(tensor, bits)
    assert minimum is not None
    q = values.numpy().reshape(rows, blocks, BLOCK)
    parts: list[NDArray[Any]] = [part.numpy().view(np.uint8).reshape(rows, blocks, 2) for part in (scale, minimum)]
    if bits == 5:
        parts.append(np.packbits(q >> 4, axis=-1, bitorder="little"))  # [R, K / 32, 4]
    low = q & 15
    parts.append(low[..., :16] | low[..., 16:] << 4)
    made: NDArray[np.uint8] = np.concatenate(parts, axis=-1)
    return made.reshape(rows, -1)  # [R, K / 32, bytes of a block] -> [R, bytes of a row]
