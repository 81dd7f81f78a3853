"""Values that a file is not expected to hold, for `python -m eval.fuzz`."""

from __future__ import annotations

import math
from copy import deepcopy
from random import Random
from typing import Any

ESCAPES = "\x1b[31mred\x1b]0;t\x07"
NUMBERS = (0, -1, 1, 2, 3, 5, 63, 96, 255, 65536, 1_000_000, 16_777_216, 2**31, 2**32 - 1, 2**53, 2**63, 10**30)
_OTHERS: tuple[Any, ...] = (
    *(0.5, -0.0, 1e-45, 1e38, math.nan, math.inf, -math.inf, None, True, False, "", "x", "yarn", "none", ESCAPES),
    *("../../x", "/etc/passwd", "\ud800", "9" * 30, [], [1, 2, 3], [0.5, "x"], [[1], [2]], {}, {"a": math.inf}),
    *({"head_dim": 32, "num_key_value_heads": 1}, [None] * 7, ["full_attention"] * 4),
)


def strange(rng: Random) -> Any:
    """Return a value that hardly any place in a file expects."""
    chance = rng.random()
    if chance < 0.5:
        return rng.choice(NUMBERS)
    if chance < 0.96:
        return deepcopy(rng.choice(_OTHERS))
    if chance < 0.98:
        return "a" * rng.choice((5_000, 200_000))
    deep: Any = 1
    for _ in range(rng.choice((20, 400))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep
