"""What tables, captions and the report say of a bench's record: counts and sizes in words, and when timings are
unreliable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DISTURBED = 0.05  # cores that waiting engines may use before timings are called unreliable


def count_noun(number: int, noun: str) -> str:
    """Return a count with its noun: "1 prompt", "2 prompts"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def byte_size(count: int) -> str:
    """Return bytes in the largest unit of which there is one: "512 bytes", "3.1 KB", "24.10 GB"."""
    for unit, size, digits in (("GB", 10**9, 2), ("MB", 10**6, 1), ("KB", 10**3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return count_noun(count, "byte")


def repetitions(record: Mapping[str, Any]) -> str:
    """Return how many repetitions the figures of a bench's record are of; "" where the record does not say.

    When a bench was interrupted, or ended by an error, its last repetition is a part of one.
    """
    asked, begun = (value if type(value) is int else None for value in map(record.get, ("repeat", "repetitions")))
    if begun is None or not (record.get("interrupted") or record.get("error")):
        known = begun if begun is not None else asked
        return "" if known is None else count_noun(known, "repetition")
    finished = record.get("repetitions_finished", begun - 1)
    if type(finished) is not int or finished < 1:
        return "a part of the first repetition" + ("" if asked in (None, 1) else f", of {asked:,}")
    whole = count_noun(finished, "repetition") + (" and a part of the next" if finished < begun else "")
    return whole if asked in (None, finished) else f"{whole}, of {asked:,}"
