"""bitsandbytes, 4 bits: NF4 and FP4, what `load_in_4bit` saves and QLoRA begins with.

A matrix `X.weight` [N, K] is bytes [N * K / 2, 1] of two codes, the high one first; `X.weight.quant_map` [16] says what
a code means, `X.weight.absmax` what each block of 64 is multiplied by. Doubly quantised, `absmax` is bytes itself, with
`X.weight.nested_quant_map` [256], `X.weight.nested_absmax` and an offset. `X.weight.quant_state.bitsandbytes__nf4` is
JSON in bytes: shape, block sizes, offset. Codes stay codes: of a table of ours whose whole numbers are near those of
`quant_map`, which is looked at; where none is, the matrix is fitted to 8 bits. FP4's numbers are e2m1's in another
order, but for the smallest, which becomes 0. Left out: LLM.int8 (`X.SCB`).
Source: https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.weights.formats.matrix import Codes, PackedMatrix, Parts, Rows, Stored, misfit, table_of
from specdec.weights.formats.settings import Settings, Small
from specdec.weights.metadata import Values, naming

_STATE = ".quant_state.bitsandbytes__"
_MOST = 1 << 16  # bytes of the JSON


def bitsandbytes_4bit(
    stored: Mapping[str, Stored], settings: Settings, small: Small
) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield the matrices of this format by name. Raises ValueError for one whose parts do not fit each other."""
    for state in [name for name in stored if _STATE in name]:
        name, _, kind = state.partition(_STATE)
        if name not in stored:
            raise ValueError(f"{state}: there is no {name} that it belongs to; fetch the files again")
        words = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        parts = {"weight": name, **{word: f"{name}.{word}" for word in words if f"{name}.{word}" in stored}}
        parts["state"] = state
        with naming(state):
            if kind not in ("nf4", "fp4"):
                raise ValueError("is of a kind that bitsandbytes does not write; fetch the files again")
            about = Values(_json(small(state) if math.prod(stored[state].shape) <= _MOST else None))
            rows, columns = about.wholes("shape", 1, length=2)
            size = about.whole("blocksize", 2, 1 << 20)
            nested = "nested_absmax" in parts
            nested_size = about.whole("nested_blocksize", 1, 1 << 20) if nested else 1
            shift = about.number("nested_offset", -1e9, 1e9) if nested else 0.0
        blocks = -(-rows * columns // size)
        due = {"weight": (rows * columns // 2, "U8"), "absmax": (blocks, "U8" if nested else "F32"),
               "quant_map": (16, "F32")}  # fmt: skip
        if nested:
            due |= {"nested_absmax": (-(-blocks // nested_size), "F32"), "nested_quant_map": (256, "F32")}
        found = {part: stored.get(parts.get(part, "")) for part in due}
        if columns % 2 or any(
            entry is None
            or (math.prod(entry.shape), entry.dtype) != due[part]
            or (part != "weight" and len(entry.shape) != 1)
            for part, entry in found.items()
        ):
            raise misfit("bitsandbytes", name, stored, parts)
        codes = table_of(small(parts["quant_map"]))
        yield (
            name,
            PackedMatrix(
                f"bitsandbytes, {kind.upper()} in blocks of {size}{', doubly quantised' if nested else ''}",
                (rows, columns),
                parts,
                _Reader(columns, size, nested_size, shift).read,
                4 if codes is not None else None,
                math.gcd(size, columns),
                codes=codes,
            ),
        )


def _json(raw: Tensor | None) -> dict[str, Any]:
    try:
        values = json.loads(bytes(raw.tolist())) if raw is not None else None
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError("holds no JSON; fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError("holds no JSON object; fetch it again")
    return values


class _Reader:
    def __init__(self, columns: int, size: int, nested_size: int, shift: float) -> None:
        self.columns, self.size, self.nested_size, self.shift = columns, size, nested_size, shift

    def read(self, parts: Parts, rows: Rows) -> Codes:
        raw = parts["weight"].view(-1, self.columns // 2)[rows]  # [R, K / 2]
        codes = torch.stack([raw >> 4, raw & 15], dim=-1).flatten(1)  # [R, K]
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, dtype=torch.int64)
        # Blocks run over the ends of rows where K is no multiple of their size; a unit lies inside of one.
        unit = math.gcd(self.size, self.columns)
        starts = torch.arange(0, self.columns, unit, dtype=torch.int64)
        block = (rows[:, None] * self.columns + starts) // self.size  # [R, units]
        return Codes(codes, self._largest(parts, block), None, parts["quant_map"])

    def _largest(self, parts: Parts, block: Tensor) -> Tensor:
        absmax = parts["absmax"].flatten()[block]
        if "nested_absmax" not in parts:
            return absmax
        return parts["nested_quant_map"][absmax.int()] * parts["nested_absmax"][block // self.nested_size] + self.shift
