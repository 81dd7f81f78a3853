"""compressed-tensors, pack-quantized and int-quantized: what llm-compressor writes, and Google's `-qat-w4a16-ct`.

A matrix `X.weight` [N, K] is `X.weight_packed`, int32 words of 4 or 8 bits along K, low bits first, each value plus
half of its range; `X.weight_scale` [N, K / group]; `X.weight_shape`, N and K; where zeros are not in the middle,
`X.weight_zero_point`, packed likewise along N. An int-quantized one (W8A8) is `X.weight`, int8 [N, K], with a scale for
each row; activations stay floats here. Left out: act-order (`X.weight_g_idx`), and widths that cross words.
Source: https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

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
    unpack_rows,
)
from specdec.weights.formats.settings import Settings, Small


def packed_quantized(
    stored: Mapping[str, Stored], settings: Settings, small: Small
) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield the matrices of this format by name. Raises ValueError for one whose parts do not fit each other."""
    for name in [name for name, entry in stored.items() if name.endswith(".weight_packed") and entry.dtype == "I32"]:
        stem = name.removesuffix("weight_packed")
        parts = {part: stem + part for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")}
        format = "compressed-tensors"
        packed, scale, _, zero = (stored.get(full) for full in parts.values())
        if stem + "weight_g_idx" in stored:
            raise ValueError(
                f"{stem}weight_g_idx: compressed-tensors with activation order, which is not read; name a checkpoint "
                "without it, a GGUF file of this model, or its 16-bit checkpoint with quantize='int4'"
            )
        if parts["weight_shape"] not in stored or stored[parts["weight_shape"]].shape != (2,):
            raise misfit(format, stem + "weight", stored, parts)
        rows, columns = (int(n) for n in small(parts["weight_shape"]))
        if not (packed and scale and rows > 0 and columns > 0 and is_matrix(packed, ("I32",), rows)):
            raise misfit(format, stem + "weight", stored, parts)
        bits = next((bits for bits in (4, 8) if -(-columns * bits // 32) == packed.shape[1]), 0)
        if not bits or not is_matrix(scale, FLOATS, rows) or columns % scale.shape[1]:
            raise misfit(f"{format} of 4 or 8 bits", stem + "weight", stored, parts)
        groups = scale.shape[1]
        if zero is None:
            del parts["weight_zero_point"]
        elif not (
            (zero.dtype == "I32" and zero.shape == (-(-rows * bits // 32), groups))
            or (zero.dtype == "I8" and zero.shape == (rows, groups))
        ):
            raise misfit(format, stem + "weight", stored, parts)
        yield (
            stem + "weight",
            PackedMatrix(
                f"{format}, {bits} bits in groups of {columns // groups}{'' if zero is None else ' with zero points'}",
                (rows, columns),
                parts,
                _Reader(bits, columns).read,
                bits,
                columns // groups,
                offset=zero is not None,
                rounds=zero is not None,
            ),
        )


def int_quantized(stored: Mapping[str, Stored], settings: Settings, small: Small) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield the matrices of bytes by name. Raises ValueError for one whose parts do not fit each other."""
    for name in [name for name, entry in stored.items() if name.endswith(".weight") and entry.dtype == "I8"]:
        stem = name.removesuffix("weight")
        parts = {part: stem + part for part in ("weight", "weight_scale")}
        if parts["weight_scale"] not in stored or stem + "weight_zero_point" in stored:
            continue  # of another format, or with zero points
        weight, scale = stored[name], stored[parts["weight_scale"]]
        rows = weight.shape[0] if is_matrix(weight, ("I8",)) else 0
        if not rows or scale.dtype not in FLOATS or scale.shape not in ((rows,), (rows, 1)):
            raise misfit("compressed-tensors", name, stored, parts)
        shape = (rows, weight.shape[1])
        yield name, PackedMatrix("compressed-tensors, 8 bits a row", shape, parts, _read_bytes, 8, shape[1])


def _read_bytes(parts: Parts, rows: Rows) -> Codes:
    values = parts["weight"][rows].contiguous().view(torch.uint8) ^ 0x80
    return Codes(values, parts["weight_scale"].view(-1, 1)[rows].float(), None)


class _Reader:
    def __init__(self, bits: int, columns: int) -> None:
        self.bits, self.columns = bits, columns

    def read(self, parts: Parts, rows: Rows) -> Codes:
        values = unpack_columns(parts["weight_packed"][rows], self.bits)[:, : self.columns]
        scale = parts["weight_scale"][rows].float()
        if (zeros := parts.get("weight_zero_point")) is None:
            return Codes(values.contiguous(), scale, None)
        if zeros.dtype.itemsize == 1:
            zero = zeros[rows].float() + (1 << (self.bits - 1))
        else:
            zero = unpack_rows(zeros, rows, self.bits).float()
        return Codes(values.contiguous(), scale, -zero * scale)
