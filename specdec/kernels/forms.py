"""The forms that blocks of weights have, and the tables of what codes mean: `blocks.py` has the layout.

A form without a kernel in `csrc/` is none. Left out: choosing one, which `specdec.weights` does.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # inputs that share one scale
HALF = BLOCK // 2  # inputs that share a factor of it, where there is one
GROUP = 16  # rows that are interleaved
# smallest and largest value, by bits
VALUES = {2: (0, 3), 3: (0, 7), 4: (0, 15), 5: (0, 31), 6: (0, 63), 8: (-128, 127)}


class BlockForm(NamedTuple):
    """Say how weights are stored: bits of a code, and whether there is a minimum, a table, factors for 16 inputs."""

    bits: int
    minimum: bool = False
    table: bool = False
    sub: bool = False


# `gemm_tile_of` of csrc/isa/product.inl has the same
FORMS = frozenset(
    (
        BlockForm(4), BlockForm(4, minimum=True), BlockForm(5), BlockForm(5, minimum=True), BlockForm(8),
        BlockForm(4, table=True), BlockForm(6, sub=True), BlockForm(3, sub=True), BlockForm(4, table=True, sub=True),
        BlockForm(3, table=True, sub=True), BlockForm(2, minimum=True, sub=True),
    )
)  # fmt: skip


class Table(NamedTuple):
    """Say what the codes of some types mean. `numbers` int8 [16]: within -127..127, and within -63..63 where 16 inputs
    have a factor. `one`: the number that the types' own definition calls 1. `unit`: a power of two, by which scales are
    multiplied, so that those of usual weights are none of the smallest that float16 has."""

    numbers: Tensor
    one: int
    unit: float


def _table(*numbers: int, one: int = 1, unit: float = 1.0) -> Table:
    return Table(torch.tensor([*numbers, *[0] * (16 - len(numbers))], dtype=torch.int8), one, unit)


TABLES = {
    "iq4": _table(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),  # IQ4_NL, IQ4_XS
    "fp4": _table(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12, one=2, unit=2**-8),  # e2m1: MXFP4, NVFP4
    # bitsandbytes' sixteen numbers from -1 to 1; 112 is the factor that brings them nearest to whole ones
    "nf4": _table(-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112, one=112, unit=2**-7),
    "iq3_s": _table(*range(-15, 16, 2)),
    "iq3_xxs": _table(-31, -26, -22, -18, -14, -10, -6, -2, 2, 6, 10, 14, 18, 22, 26, 31, unit=2**-1),
    "iq2": _table(8, 25, 43, 0, -8, -25, -43, unit=2**-3),  # IQ2_XXS, IQ2_XS, IQ2_S: bit 2 of a code is the sign
    "iq1": _table(-9, -1, 7, 0, -7, 1, 9, unit=2**-3),  # IQ1_S, IQ1_M: bit 2 of a code is the sign of an eighth
}


@cache
def table_numbers(name: str, device: torch.device) -> Tensor:
    """Return the numbers of the table `name` on `device`: a copy that is made once, which a captured pass may read."""
    return TABLES[name].numbers.to(device)


_WITH_SUB = 63  # the largest number of a table whose codes may have factors for 16 inputs


def check_form(form: BlockForm, table: str | None) -> None:
    """Raise a ValueError for a form or a table that there is not."""
    if form.bits == 8 and form.minimum:
        raise ValueError("8-bit blocks have no minimum; use 4 or 5 bits, or fold the minimum into the values")
    if form not in FORMS:
        raise ValueError(
            "blocks have 4, 5 or 8 bits, 4 with a table, or 2 (with a minimum), 3, 6, 3 or 4 with a table, where each "
            f"{HALF} inputs have a factor; not {form}"
        )
    if table is not None and table not in TABLES:
        raise ValueError(f"there is no table {table!r} among {', '.join(TABLES)}")
    if table is not None and form.sub and int(TABLES[table].numbers.abs().max()) > _WITH_SUB:
        raise ValueError(f"the numbers of table {table!r} are too large for blocks with factors for {HALF} inputs")
