"""A folder of floats, written again as another program quantises it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.synthetic.packed.formats import FORMATS
from specdec.util.atomic import replacing
from specdec.weights.formats.experts import is_stack

_LARGEST = (0.6, 0.38, 0.01, 0.006, 0.004)  # of blocks, whose largest number is 8, 7, 6, 5, 4
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_packed(
    source: Path,
    folder: Path,
    format: str,
    rename: Callable[[str], str] = lambda name: name,
    in_text: bool = False,
    vocabulary: bool = False,
) -> dict[str, Tensor]:
    """Write the model in the folder `source`, one file of floats, to `folder` in one of FORMATS; return the floats that
    every tensor then stands for, by its name in `source`.

    Matrices of layers are quantised, where their inputs are a multiple of the format's group; with `vocabulary` the
    embedding as well. `rename`: the names that the file has. `in_text`: the config tells of it in its text part.
    """
    stored, floats = dict[str, Tensor](), dict[str, Tensor]()
    kind = FORMATS[format]
    for name, tensor in load_file(source / WEIGHTS).items():
        wanted = ".layers." in f".{name}" or (vocabulary and "embed_tokens" in name)
        matrix = tensor.ndim == 2 or (tensor.ndim == 3 and is_stack(name))
        if not matrix or not wanted or not name.endswith(".weight") or tensor.shape[-1] % kind.multiple:
            stored[rename(name)], floats[name] = tensor, tensor.float()
            continue
        parts, made = kind.store(tensor.flatten(0, -2))  # of a stack of experts, one below the other
        floats[name] = made.view(tensor.shape)
        stem = rename(name).removesuffix("weight")
        for part, content in parts.items():
            stacked = content.view(*tensor.shape[:2], -1) if tensor.ndim == 3 else content
            stored[stem + part] = stacked.contiguous()
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in (WEIGHTS, CONFIG):
            shutil.copy(file, folder / file.name)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    (config["text_config"] if in_text else config).update(kind.config)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return floats


def bfloat16_on_lattice(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a matrix [rows, columns] as quantisation-aware training for Q4_0 leaves one: blocks of 32 whole numbers
    -8..7 times a step, in bfloat16.

    The largest number of a block is -8 in 60 %, 7 in 38 %, less in the others, as counted in a published checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = rows * columns // 32
    reach = 8.0 - torch.multinomial(torch.tensor(_LARGEST, dtype=torch.float32), blocks, True, generator=generator)
    shape = torch.randn(blocks, 32, generator=generator, dtype=torch.float32)
    codes = (shape / shape.abs().amax(1, keepdim=True) * reach[:, None]).round()
    first, at = torch.arange(blocks, dtype=torch.int64), codes.abs().argmax(1)
    largest = torch.where(reach == 8, -reach, reach * codes[first, at].sign())
    codes.clamp_(-7, 7)[first, at] = largest
    step = (0.75 + 0.5 * torch.rand(blocks, generator=generator, dtype=torch.float32)) / 200
    step *= torch.where(torch.rand(blocks, generator=generator, dtype=torch.float32) < 0.5, -1.0, 1.0)
    return (codes * step[:, None]).view(rows, columns).bfloat16()
