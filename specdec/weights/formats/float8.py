"""Floats of 8 bits (e4m3) with scales: what transformers, vLLM, llm-compressor and modelopt call fp8, MLX mxfp8.

A matrix `X.weight` [N, K] of F8_E4M3 is multiplied by `X.weight_scale`, one number, one for each row, or one for each
square of 128 x 128, or by `X.weight_scale_inv`, which is multiplied as well, whatever its name says. Scales of
activations (`X.input_scale`) are not needed: activations stay floats here. Eight bits of a float are no steps, so the
matrix is fitted to 8 bits. MLX has the bytes in uint32 words, and a scale for 32 inputs, a power of two (e8m0). Left
out: e5m2, and blocks of other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from specdec.kernels import BLOCK
from specdec.weights.formats.float4 import powers_of_two
from specdec.weights.formats.matrix import PackedMatrix, Parts, Rows, Stored, is_matrix, misfit
from specdec.weights.formats.settings import Settings, Small

_SCALES = ("F32", "F16", "BF16", "F8_E8M0")
_BLOCK = 128


def float8(stored: Mapping[str, Stored], settings: Settings, small: Small) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield the matrices of this format by name. Raises ValueError for one whose scale is missing or does not fit."""
    for name in [name for name, entry in stored.items() if name.endswith(".weight") and entry.dtype == "F8_E4M3"]:
        word = "weight_scale_inv" if f"{name}_scale_inv" in stored else "weight_scale"
        parts = {"weight": name, word: name.removesuffix("weight") + word}
        weight, scale = stored[name], stored.get(parts[word])
        if scale is None or scale.dtype not in _SCALES or not is_matrix(weight, ("F8_E4M3",)):
            raise misfit("8-bit floats", name, stored, parts)
        rows, columns = weight.shape
        squares = (-(-rows // _BLOCK), -(-columns // _BLOCK))
        if math.prod(scale.shape) == 1:
            how, reader = "a scale", _Reader(word, 0)
        elif scale.shape in ((rows,), (rows, 1)):
            how, reader = "a scale for each row", _Reader(word, 1)
        elif scale.shape == squares:
            how, reader = "a scale for each 128 x 128", _Reader(word, _BLOCK)
        else:
            raise misfit("8-bit floats", name, stored, parts)
        yield name, PackedMatrix(f"8-bit floats (e4m3), {how}", (rows, columns), parts, reader.read)


def mlx_float8(shape: tuple[int, int], parts: Mapping[str, str]) -> PackedMatrix:
    """Return a matrix of MLX whose `parts`, weight and scales, are known to fit."""
    return PackedMatrix("MLX, MXFP8", shape, parts, _read_mlx)


def _read_mlx(parts: Parts, rows: Rows) -> Tensor:
    values = parts["weight"][rows].contiguous().view(torch.float8_e4m3fn).float()  # [R, K]
    groups = values.view(len(values), -1, BLOCK) * powers_of_two(parts["scales"][rows])[..., None]
    return groups.view(values.shape)


class _Reader:
    def __init__(self, word: str, block: int) -> None:
        self.word, self.block = word, block

    def read(self, parts: Parts, rows: Rows) -> Tensor:
        values, scale = parts["weight"][rows].float(), parts[self.word].float()
        if self.block == 0:
            return values * scale.flatten()
        ids = torch.arange(rows.start, rows.stop, dtype=torch.int64) if isinstance(rows, slice) else rows
        if self.block == 1:
            return values * scale.view(-1, 1)[ids]
        columns = torch.arange(values.shape[1], dtype=torch.int64) // self.block
        return values * scale[ids // self.block][:, columns]
