"""Damage to GGUF files: a file is read as a list of fields and a list of tensors, damaged, and written again.

What: `damage_gguf`, and `read_gguf` and `write_gguf`, which read and write files whose statements are false. Why not
the `gguf` package: it writes whole files only.
"""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

from eval.fuzz.values import ESCAPES, NUMBERS, strange

_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def damage_gguf(data: bytes, rng: Random) -> bytes:
    """Return the bytes of a damaged copy of the file that has the bytes `data`."""
    version, fields, tensors, end = read_gguf(data)
    kind = rng.random()
    if kind < 0.7:
        for _ in range(rng.choice((1, 1, 2))):
            _change_field(fields, rng)
    elif kind < 0.95:
        tensor = rng.choice(tensors)
        at = rng.randrange(4)
        if at == 1 and tensor[1] and rng.random() < 0.7:
            tensor[1][rng.randrange(len(tensor[1]))] = rng.choice(NUMBERS)
        elif at == 1:
            tensor[1] = [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 4, 9)))]
        elif at == 0:
            tensor[0] = rng.choice((ESCAPES, "", "x" * 70_000, rng.choice(tensors)[0]))
        else:
            tensor[at] = rng.choice((*NUMBERS[:-1], 8, 12, 30, 1000))
    else:
        version = rng.choice((0, 1, 2, 4, 1 << 24, 2**32 - 1))
    counts = (len(tensors), len(fields)) if rng.random() < 0.95 else (rng.choice(NUMBERS), rng.choice(NUMBERS))
    values = bytearray(data[end:])
    if rng.random() < 0.1 and values:
        at = rng.randrange(len(values))
        values[at : at + 4] = b"\xff\xff\xff\x7f"
    return write_gguf(version, fields, tensors, bytes(values), counts)


def _change_field(fields: list[list[Any]], rng: Random) -> None:
    field = rng.choice(fields)
    kind = rng.random()
    if kind < 0.2 and isinstance(field[2], list) and field[2]:
        items = field[2]
        value = rng.choice((*NUMBERS, "x", ESCAPES, "", "a" * 200_000, math.nan, -math.inf, items[0]))
        if isinstance(value, type(items[0])):
            items[rng.randrange(len(items))] = value
        else:
            field[2] = [value] * rng.choice((1, len(items)))
            field[1] = None
    elif kind < 0.7:
        field[1], field[2] = None, strange(rng)
    elif kind < 0.8:
        fields.remove(field)
    elif kind < 0.85:
        fields.append(list(field))
    elif kind < 0.9:
        field[0] = rng.choice((ESCAPES, "", rng.choice(fields)[0], "general.alignment", "x" * 70_000))
    elif kind < 0.95:
        fields.append(["general.alignment", None, rng.choice(NUMBERS)])
    elif isinstance(field[2], list):
        field[2] = field[2][: rng.randrange(len(field[2]) + 1)]
    else:
        field[1] = rng.randrange(15)  # said to be of another type than it is


def write_gguf(
    version: int,
    fields: list[list[Any]],
    tensors: list[list[Any]],
    values: bytes,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return the bytes of a file with these `fields`, `tensors` and `values`.

    `fields`: (key, type or None, value). `tensors`: (name, dimensions, type, offset). `counts` (tensors, fields): the
    numbers in the file's head.
    """
    made = b"GGUF" + struct.pack("<I", version)
    made += b"".join(_integer(n, 8) for n in counts or (len(tensors), len(fields)))
    made += b"".join(_text(key) + _value(value, kind) for key, kind, value in fields)
    for name, dims, stored, offset in tensors:
        made += _text(name) + _integer(len(dims), 4) + b"".join(_integer(d, 8) for d in dims)
        made += _integer(stored, 4) + _integer(offset, 8)
    return made + bytes(-len(made) % 32) + values


def read_gguf(data: bytes) -> tuple[int, list[list[Any]], list[list[Any]], int]:
    """Return version, fields and tensors of a whole file as `write_gguf` takes them, and where its values begin."""
    version, count, fields = struct.unpack_from("<IQQ", data, 4)
    at = 24

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind: int) -> Any:
        if kind == _TEXT:
            return text()
        if kind == _ARRAY:
            inner, size = take("I"), take("Q")
            return [value(inner) for _ in range(size)]
        return take(_PLAIN[kind])

    metadata = []
    for _ in range(fields):
        key, kind = text(), take("I")
        metadata.append([key, kind, value(kind)])
    tensors = []
    for _ in range(count):
        name = text()
        dims = [take("Q") for _ in range(take("I"))]
        tensors.append([name, dims, take("I"), take("Q")])
    return version, metadata, tensors, at + -at % 32


def _integer(value: Any, size: int) -> bytes:
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any, kind: int | None) -> bytes:
    """Return the bytes of the type and the value; with a `kind` that does not fit the value, the type is false."""
    right = _kind(value)
    if kind is not None and isinstance(value, list) and value:
        inner = _element(value, kind)
        return struct.pack("<IIQ", _ARRAY, inner, len(value)) + b"".join(_scalar(v, inner) for v in value)
    told = right if kind is None else kind
    return struct.pack("<I", told) + (_scalar(value, told) if told in _PLAIN else _scalar(value, right))


def _element(value: list[Any], kind: int) -> int:
    numbers = [v for v in value if isinstance(v, int) and not isinstance(v, bool)]
    if len(numbers) == len(value):
        return 5 if all(-(1 << 31) <= v < 1 << 31 for v in numbers) else 11
    return _kind(value[0])


def _kind(value: Any) -> int:
    if isinstance(value, bool) or value is None:
        return 7
    if isinstance(value, int):
        return 4 if 0 <= value < 1 << 32 else 5 if -(1 << 31) <= value < 0 else 10
    return 6 if isinstance(value, float) else _ARRAY if isinstance(value, list) else _TEXT


def _scalar(value: Any, kind: int) -> bytes:
    if kind == _ARRAY:
        inner = _kind(value[0]) if isinstance(value, list) and value else 4
        items = value if isinstance(value, list) else []
        return struct.pack("<IQ", inner, len(items)) + b"".join(_scalar(v, inner) for v in items)
    if kind not in _PLAIN:
        return _text(value if isinstance(value, str) else json.dumps(value))
    if kind in (6, 12):
        number = float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.inf
        return (
            struct.pack("<d", number) if kind == 12 else struct.pack("<f", number if abs(number) < 3e38 else math.inf)
        )
    number = int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 1
    return _integer(number, struct.calcsize(f"<{_PLAIN[kind]}"))
