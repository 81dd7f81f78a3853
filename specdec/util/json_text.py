"""JSON of strangers: what RFC 8259 allows, and no deeper than programs can follow."""

from __future__ import annotations

import json
import math
from typing import Any

DEEPEST = 100  # lists and objects inside each other: what reads them recurses, a few calls for each


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text, which is UTF-8 where it comes in bytes.

    Raises ValueError for one that is no JSON, and for what Python reads and cannot write again: NaN and numbers that
    are too large, half of a surrogate pair, and nesting that is deeper than `DEEPEST`.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    _check_depth(value)
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [each for each in one.values() if isinstance(each, (dict, list))]
            elif isinstance(one, list):
                inner += [each for each in one if isinstance(each, (dict, list))]
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {DEEPEST} deep")
