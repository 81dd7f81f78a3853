"""AWQ and GPTQ: matrices stored with inputs first, as `X.qweight`, `X.qzeros` and `X.scales`.

Both pack 4 bits (GPTQ 8 as well) into int32 words, with scales [K / group, N] and zeros [K / group, N / 8] packed along
N: weight = (value - zero) * scale.

    AWQ (gemm)  qweight [K, N / 8], packed along N; a word's nibbles, low ones first, are columns 0 2 4 6 1 3 5 7
    GPTQ        qweight [K / 8, N], packed along K, in order; `X.g_idx` [K] is the group of each input

GPTQ files store zeros less one, unless `checkpoint_format` says "gptq_v2". Where all zeros are in the middle, the
config says so (`sym`), and our blocks need no minimum. Left out: activation order that shuffles the groups, AWQ's other
kernels (gemv, marlin), 2 and 3 bits.
Sources: https://github.com/casper-hansen/AutoAWQ, https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

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

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of its columns
_SHUFFLED = (
    "GPTQ with activation order (desc_act), whose groups are shuffled, which is not read; name a checkpoint without "
    "it, a GGUF file of this model, or its 16-bit checkpoint with quantize='int4'"
)


def awq_and_gptq(stored: Mapping[str, Stored], settings: Settings, small: Small) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield the matrices of both formats by name.

    Raises ValueError for one whose parts do not fit each other or the config, for shuffled groups, and for zeros that
    are not where the config says.
    """
    checked = False
    for name in [name for name, entry in stored.items() if name.endswith(".qweight") and entry.dtype == "I32"]:
        stem = name.removesuffix("qweight")
        parts = {part: stem + part for part in ("qweight", "qzeros", "scales")}
        qweight, qzeros, scales = (stored.get(full) for full in parts.values())
        if not (qweight and scales and is_matrix(qweight, ("I32",)) and is_matrix(scales, FLOATS)):
            raise misfit("AWQ or GPTQ", stem + "weight", stored, parts)
        groups, outputs = scales.shape
        awq = qweight.shape[1] * 8 == outputs
        if not awq and qweight.shape[1] != outputs:
            raise misfit("AWQ or GPTQ", stem + "weight", stored, parts)
        settings.must_be(*(("awq", "auto-round") if awq else ("gptq", "gptqmodel", "auto-round")))
        bits = settings.whole("bits", 1, 8, settings.whole("w_bit", 1, 8, 4))
        format = "AWQ" if awq else "GPTQ"
        if bits not in ((4,) if awq else (4, 8)):
            raise ValueError(
                f"{stem}qweight: {format} of {bits} bits, which is not read; name one of 4 bits, or a GGUF file of "
                "this model"
            )
        inputs = qweight.shape[0] if awq else qweight.shape[0] * 32 // bits
        fits = outputs % (32 // bits) == 0 and is_matrix(qzeros, ("I32",), groups) and inputs % groups == 0
        if qzeros is None or not fits or qzeros.shape[1] != outputs * bits // 32:
            raise misfit(format, stem + "weight", stored, parts)
        group = inputs // groups
        told = f"{bits} bits in groups of {group}"
        if awq:
            yield (
                stem + "weight",
                PackedMatrix(
                    f"AWQ, {told}", (outputs, inputs), parts, _read_awq, bits, group, offset=True, rounds=True
                ),
            )
            continue
        if (ids := stem + "g_idx") in stored:
            expected = torch.arange(inputs, dtype=torch.int64) // group
            if stored[ids].shape != (inputs,) or not torch.equal(small(ids).long(), expected):
                raise ValueError(f"{ids}: {_SHUFFLED}")
        symmetric = settings.flag("sym", default=True)
        first = symmetric and not checked
        checked = True
        stored_less = 0 if settings.text("checkpoint_format", "gptq") == "gptq_v2" else 1
        reader = _GPTQ(bits, stored_less, symmetric, stem + "qzeros")
        if first:  # one matrix tells before minutes of work what is wrong with all of them
            reader.zeros(small(parts["qzeros"]), slice(0, outputs))
        yield stem + "weight", PackedMatrix(
            f"GPTQ, {told}{'' if symmetric else ' with zero points'}",
            (outputs, inputs), parts, reader.read, bits, group, offset=not symmetric, rounds=not symmetric,
        )  # fmt: skip


def _read_awq(parts: Parts, rows: Rows) -> Codes:
    values = unpack_rows(parts["qweight"].t(), rows, 4, _AWQ_PLACES)
    zeros = unpack_rows(parts["qzeros"].t(), rows, 4, _AWQ_PLACES).float()
    scale = parts["scales"].t()[rows].float()
    return Codes(values, scale, -zeros * scale)


class _GPTQ:
    def __init__(self, bits: int, less: int, symmetric: bool, name: str) -> None:
        self.bits, self.less, self.symmetric, self.name = bits, less, symmetric, name

    def read(self, parts: Parts, rows: Rows) -> Codes:
        values = unpack_columns(parts["qweight"].t()[rows], self.bits)  # words [R, K / 8]
        zeros = self.zeros(parts["qzeros"], rows)
        scale = parts["scales"].t()[rows].float()
        return Codes(values, scale, None if self.symmetric else -zeros.float() * scale)

    def zeros(self, packed: Tensor, rows: Rows) -> Tensor:
        """Return the zeros of rows, uint8 [R, groups]. Raises ValueError where they are not where the config says."""
        zeros = unpack_rows(packed.t(), rows, self.bits) + self.less & (1 << self.bits) - 1
        if self.symmetric and bool((zeros != 1 << (self.bits - 1)).any()):
            raise ValueError(
                f"{self.name}: zeros that are not in the middle, where the config says that they are (sym); fetch "
                "config and weights again, from the same repository"
            )
        return zeros
