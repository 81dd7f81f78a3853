"""MLX: what mlx-lm and mlx-vlm write.

A matrix `X.weight` [N, K] is a stream of 2 to 8 bits in uint32 words [N, K * bits / 32], low bits first, with
`X.scales` and `X.biases` [N, K / group]: weight = value * scale + bias. Bits and group stand in the config, for single
modules under their paths. 8 bits have a bias that our 8 bits do not have, so 6 and 8 bits are fitted again.

That is the mode affine. Matrices of the modes mxfp4, nvfp4 and mxfp8 are floats of 4 or 8 bits without biases, and
scales that are bytes. Their sizes tell which, so that a module whose path the config has under another prefix is no
other one. Source: https://github.com/ml-explore/mlx
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from specdec.kernels import BLOCK, HALF
from specdec.weights.formats.float4 import mlx_float4
from specdec.weights.formats.float8 import mlx_float8
from specdec.weights.formats.matrix import (
    FLOATS,
    Codes,
    PackedMatrix,
    Parts,
    Rows,
    Stored,
    is_matrix,
    misfit,
    unpack_columns,
)
from specdec.weights.formats.settings import Settings, Small
from specdec.weights.metadata import Values, naming

_BITS = (2, 3, 4, 5, 6, 8)


def mlx_packed(stored: Mapping[str, Stored], settings: Settings, small: Small) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield the matrices of this format by name. Raises ValueError for one whose parts do not fit each other or the
    config."""
    for name in [name for name, entry in stored.items() if name.endswith(".weight") and entry.dtype == "U32"]:
        stem = name.removesuffix("weight")
        parts = {part: stem + part for part in ("weight", "scales", "biases")}
        if parts["biases"] not in stored and stored.get(parts["scales"], _NONE).dtype == "U8":
            yield name, _small_floats(name, stored, {part: parts[part] for part in ("weight", "scales")})
            continue
        module = _of(settings, stem[:-1])
        with naming(settings.path):
            bits, group = module.whole("bits", 1, 8, default=4), module.whole("group_size", 1, 1 << 20, default=64)
        weight, scales, biases = (stored.get(full) for full in parts.values())
        if not (weight and scales and biases and is_matrix(weight, ("U32",))):
            raise misfit("MLX", name, stored, parts)
        rows, words = weight.shape
        if not is_matrix(scales, FLOATS, rows) or biases.shape != scales.shape or biases.dtype not in FLOATS:
            raise misfit("MLX", name, stored, parts)
        groups = scales.shape[1]
        if words * 32 != groups * group * bits:  # a path that the config has under another prefix
            bits = words * 32 // (groups * group)
        if bits not in _BITS or words * 32 != groups * group * bits:
            raise misfit(f"MLX in groups of {group}", name, stored, parts)
        yield (
            name,
            PackedMatrix(
                f"MLX, {bits} bits in groups of {group}",
                (rows, groups * group),
                parts,
                _Reader(bits).read,
                bits,
                group,
                offset=True,
            ),
        )


_NONE = Stored((), "")


def _small_floats(name: str, stored: Mapping[str, Stored], parts: Mapping[str, str]) -> PackedMatrix:
    weight, scale = (stored[full] for full in parts.values())
    if not (is_matrix(weight, ("U32",)) and is_matrix(scale, ("U8",), weight.shape[0])):
        raise misfit("MLX's floats of 4 or 8 bits", name, stored, parts)
    rows, bytes_of_a_row = weight.shape[0], 4 * weight.shape[1]
    per_scale = bytes_of_a_row / scale.shape[1]
    if per_scale == BLOCK:
        return mlx_float8((rows, bytes_of_a_row), parts)
    if per_scale in (HALF, HALF // 2):
        return mlx_float4((rows, 2 * bytes_of_a_row), int(2 * per_scale), parts)
    raise misfit("MLX's floats of 4 or 8 bits", name, stored, parts)


def _of(settings: Settings, path: str) -> Values:
    """Return the settings of the module `path`: its own, else those of the model."""
    whole = settings.mlx
    with naming(settings.path):
        own = whole.find(path)
        return Values({**_numbers(whole), **own}) if isinstance(own, Mapping) else whole


def _numbers(values: Values) -> dict[str, object]:
    return {name: values.find(name) for name in ("bits", "group_size", "mode")}


class _Reader:
    def __init__(self, bits: int) -> None:
        self.bits = bits

    def read(self, parts: Parts, rows: Rows) -> Codes:
        words = parts["weight"][rows].view(torch.int32)
        return Codes(unpack_columns(words, self.bits), parts["scales"][rows].float(), parts["biases"][rows].float())
