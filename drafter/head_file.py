"""Writing a head of our own format: matrices as 8-bit blocks (GGUF's Q8_0), vectors as float32, one small file.

What: `write_head` for `model.gguf`. 8 bits because a draft's acceptance is the same there and the file is what a user
downloads; GGUF because the backbone's reader then reads it too. The float weights that training goes on from are kept
apart, in its own checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from specdec.kernels import unpack_blocks
from specdec.weights.tensors import BLOCK, quantize

HEAD_FILE = "model.gguf"
ARCHITECTURE = "specdec-mtp"
DRAFT_IDS = "specdec.draft_ids"  # metadata: the backbone's ids of a pruned head's candidates, ascending


def write_head(folder: Path, tensors: Mapping[str, Tensor], draft_ids: Tensor | None) -> None:
    """Write `tensors` (float, named as transformers would) to `folder`, all or nothing."""
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


def q8_0(tensor: Tensor, name: str) -> npt.NDArray[np.uint8]:
    """A matrix [N, K] as Q8_0 bytes [N, K / 32 * 34]: of every 32 values a float16 scale, then int8 values."""
    values, scale, _ = unpack_blocks(quantize(tensor.float(), "int8", name=name).blocks)
    rows, columns = tensor.shape
    raw = torch.empty(rows, columns // BLOCK, 2 + BLOCK, dtype=torch.uint8)
    raw[..., :2] = scale.contiguous().view(torch.uint8).view(rows, -1, 2)  # [N, K / 32, 2]
    raw[..., 2:] = values.view(torch.uint8).view(rows, -1, BLOCK)  # [N, K / 32, 32]
    bytes_: npt.NDArray[np.uint8] = raw.view(rows, -1).numpy()
    return bytes_
