"""Floats of 4 bits (e2m1) with scales of 8 bits: MXFP4 and NVFP4, as MLX, llm-compressor and modelopt write them.

    MXFP4   a scale for 32 inputs, a power of two (e8m0)
    NVFP4   a scale for 16 inputs, a float (e4m3), and mostly one of the whole matrix, float32

Each matrix [N, K] is nibbles along K, low ones first, under names of the program's own:

    MLX                 `X.weight` uint32 [N, K / 8], `X.scales` bytes [N, K / group]
    compressed-tensors  `X.weight_packed` [N, K / 2], `X.weight_scale`; `X.weight_global_scale` [1], which divides
    modelopt            `X.weight` [N, K / 2], `X.weight_scale`; `X.weight_scale_2` [], which multiplies

Codes stay what they are: of the table "fp4". Left out: experts in tensors of three dimensions.
Sources: https://github.com/ml-explore/mlx, https://github.com/neuralmagic/compressed-tensors,
https://github.com/NVIDIA/Model-Optimizer
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from specdec.kernels import BLOCK, HALF
from specdec.weights.formats.matrix import (
    Codes,
    PackedMatrix,
    Parts,
    Rows,
    Stored,
    TableCodes,
    is_matrix,
    misfit,
    unpack_columns,
)
from specdec.weights.formats.settings import Settings, Small
from specdec.weights.metadata import quote

_NAMES = {BLOCK: "MXFP4", HALF: "NVFP4"}
_CODES = TableCodes("fp4", torch.arange(16, dtype=torch.uint8), 1.0, exact=True)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_MAGNITUDES, *(-number for number in _MAGNITUDES)], dtype=torch.float32)
_SCALES = {HALF: ("F8_E4M3", "U8"), BLOCK: ("U8", "F8_E8M0")}  # types that safetensors files have for scales


def mlx_float4(shape: tuple[int, int], group: int, parts: Mapping[str, str]) -> PackedMatrix:
    """Return a matrix of MLX whose `parts`, weight and scales, are known to fit; `group`: 16 or 32."""
    return _matrix("MLX", shape, parts, _Reader("weight", "scales", group))


def float4(stored: Mapping[str, Stored], settings: Settings, small: Small) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield the matrices of compressed-tensors and modelopt by name. Raises ValueError for one whose parts do not fit
    each other, or whose scale of the whole is no number to multiply by."""
    for name in [name for name, entry in stored.items() if entry.dtype == "U8"]:
        stem, _, last = name.rpartition(".")
        whole = {"weight_packed": "weight_global_scale", "weight": "weight_scale_2"}.get(last)
        if whole is None or (last == "weight" and not {f"{stem}.{whole}", f"{stem}.weight_scale"} <= stored.keys()):
            continue
        program = "compressed-tensors" if last == "weight_packed" else "modelopt"
        words = (last, "weight_scale", *([whole] if f"{stem}.{whole}" in stored else []))
        parts, entry = {word: f"{stem}.{word}" for word in words}, stored[name]
        scale = stored.get(parts["weight_scale"], Stored((), ""))
        columns = 2 * entry.shape[-1] if is_matrix(entry, ("U8",)) else 0
        group = columns // scale.shape[-1] if len(scale.shape) == 2 and 0 not in scale.shape else 0
        if (
            group not in _SCALES
            or (entry.shape[0], columns) != (scale.shape[0], group * scale.shape[1])
            or scale.dtype not in _SCALES[group]
            or (whole in parts) != (group == HALF)
            or (whole in parts and math.prod(stored[parts[whole]].shape) != 1)
        ):
            raise misfit(f"4-bit floats of {program}", f"{stem}.weight", stored, parts)
        factor = float(small(parts[whole]).double()) if whole in parts else 1.0
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{quote(f'{stem}.{whole}')} is {factor}, by which nothing can be scaled; fetch it again")
        reader = _Reader(last, "weight_scale", group, 1 / factor if program == "compressed-tensors" else factor)
        yield f"{stem}.weight", _matrix(program, (entry.shape[0], columns), parts, reader)


def _matrix(program: str, shape: tuple[int, int], parts: Mapping[str, str], reader: _Reader) -> PackedMatrix:
    return PackedMatrix(f"{program}, {_NAMES[reader.group]}", shape, parts, reader.read, 4, reader.group, codes=_CODES)


class _Reader:
    def __init__(self, codes: str, scale: str, group: int, whole: float = 1.0) -> None:
        self.codes, self.scale, self.group, self.whole = codes, scale, group, whole

    def read(self, parts: Parts, rows: Rows) -> Codes:
        words = parts[self.codes][rows].contiguous()
        scale = parts[self.scale][rows].contiguous().view(torch.uint8)
        scales = scale.view(torch.float8_e4m3fn).float() if self.group == HALF else powers_of_two(scale)
        return Codes(unpack_columns(words, 4), scales, None, _NUMBERS, self.whole)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return what bytes of e8m0 mean, float32; 255 is no number."""
    powers = torch.exp2(exponents.float() - 127)
    return torch.where(exponents == 255, torch.nan, powers)
