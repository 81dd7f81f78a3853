"""Damage done to files: what `python -m eval.fuzz` changes in a file of each format that is read.

What: `damage` changes one file in place. Mostly by its structure (a value of another kind, a number that is too large,
a key gone or twice, a length that is forged), for that reaches the code behind the parser; now and then by its bytes.
Where a format keeps checksums of its own (packed files), they are made right again: an attacker would. Left out: files
that are large because they are large.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

RAW = 0.15  # of cases: bytes are changed, whatever they mean
_ESCAPES = "\x1b[31mred\x1b]0;t\x07"
_NUMBERS = (0, -1, 1, 2, 3, 5, 63, 96, 255, 65536, 1_000_000, 16_777_216, 2**31, 2**32 - 1, 2**53, 2**63, 10**30)
_OTHERS: tuple[Any, ...] = (
    *(0.5, -0.0, 1e-45, 1e38, math.nan, math.inf, -math.inf, None, True, False, "", "x", "yarn", "none", _ESCAPES),
    *("../../x", "/etc/passwd", "\ud800", "9" * 30, [], [1, 2, 3], [0.5, "x"], [[1], [2]], {}, {"a": math.inf}),
    *({"head_dim": 32, "num_key_value_heads": 1}, [None] * 7, ["full_attention"] * 4),
)


def damage(path: Path, rng: Random) -> None:
    """Change the file `path`, whose suffix says its format."""
    data = path.read_bytes()
    made = _raw(data, rng) if rng.random() < RAW else _FORMATS[path.suffix](data, rng)
    path.unlink()  # it may be a link to the file that was whole
    path.write_bytes(made)


def strange(rng: Random) -> Any:
    """A value that hardly any place in a file expects."""
    chance = rng.random()
    if chance < 0.5:
        return rng.choice(_NUMBERS)
    if chance < 0.96:
        return deepcopy(rng.choice(_OTHERS))
    if chance < 0.98:
        return "a" * rng.choice((5_000, 200_000))
    deep: Any = 1
    for _ in range(rng.choice((20, 400))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def _raw(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(changed[: rng.randrange(len(changed) + 1)])
    if kind == 1:
        at = rng.randrange(len(changed) + 1)
        changed[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        return bytes(changed)
    for _ in range(rng.choice((1, 2, 20))):
        # The front is where the lengths are.
        at = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 400))
        if kind == 2:
            changed[at] ^= 1 << rng.randrange(8)
        else:
            changed[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, struct.pack("<Q", 2**40)))[: len(changed) - at]
    return bytes(changed)


# JSON


def change(tree: Any, rng: Random) -> None:
    """Change one to three places of a JSON value, a list or an object, in place."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return
        holder, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.65:
            holder[key] = strange(rng)
        elif kind < 0.75:
            del holder[key]
        elif kind < 0.85:
            other, its = rng.choice(places)
            holder[key] = deepcopy(other[its]) if its in other or isinstance(other, list) else None
        elif kind < 0.92 and isinstance(holder, dict):
            holder[rng.choice((_ESCAPES, "x", "to_dict", "auto_map", "num_labels", "__class__"))] = strange(rng)
        elif isinstance(holder[key], list) and holder[key]:
            holder[key] = holder[key] * rng.choice((0, 2, 3)) if rng.random() < 0.7 else holder[key][:-1]
        elif isinstance(holder[key], (int, float)):
            holder[key] = -holder[key] if rng.random() < 0.3 else holder[key] + rng.choice((1, -1, 7))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Where values stand inside `tree`: (holder, key). Of a long list only some, or nothing else were ever changed."""
    found = []
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if len(keys) > 40 and holder is not tree:
            keys = keys[:5] + keys[-5:]
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])
    return found


def _json(data: bytes, rng: Random) -> bytes:
    tree = json.loads(data)
    if rng.random() < 0.03:
        return json.dumps(strange(rng)).encode()
    change(tree, rng)
    text = json.dumps(tree)
    if rng.random() < 0.05 and isinstance(tree, dict) and tree:  # a key twice: the last one counts, for most readers
        text = text[:-1] + f", {json.dumps(rng.choice(list(tree)))}: {json.dumps(strange(rng))}}}"
    return text.encode()


def _lines(data: bytes, rng: Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng)
    return b"\n".join(lines)


# Files with an index in JSON


def _safetensors(data: bytes, rng: Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    if "about" in metadata and rng.random() < 0.5:
        about = json.loads(metadata["about"])
        change(about, rng)
        metadata["about"] = json.dumps(about)
    elif rng.random() < 0.4:  # another shape of as many values: every offset is right, and checksums too
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name]["shape"] = _reshaped(header[name]["shape"], rng)
    elif rng.random() < 0.1:  # two tensors take each other's places
        one, two = rng.sample([name for name in header if name != "__metadata__"], 2)
        header[one], header[two] = header[two], header[one]
    else:
        change(header, rng)
    made = json.dumps(header).encode()
    told = len(made) if rng.random() < 0.95 else rng.choice((0, 2**63, len(made) - 1, 10**8))
    values = bytearray(data[8 + size :])
    if rng.random() < 0.1 and values:
        at = rng.randrange(len(values))
        values[at : at + 4] = rng.choice((b"\xff\xff\xff\x7f", bytes(4), b"\xff" * 4))
    return told.to_bytes(8, "little") + made + bytes(values)


def _reshaped(shape: list[int], rng: Random) -> list[int]:
    count = math.prod(shape)
    return rng.choice(([count], [1, count], [count, 1], [1, 1, *shape], shape[::-1], [count, 0], [2**31, *shape]))


def _packed(data: bytes, rng: Random) -> bytes:
    size = int.from_bytes(data[-48:-40], "little")
    index = json.loads(data[-48 - size : -48])
    change(index["tensors"] if rng.random() < 0.9 else index, rng)
    made = json.dumps(index).encode()
    told = size if rng.random() < 0.03 else len(made)
    return data[: -48 - size] + made + told.to_bytes(8, "little") + hashlib.sha256(made).digest() + data[-8:]


# GGUF: read as a list of fields and a list of tensors, and written again whatever has become of them

_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def _gguf(data: bytes, rng: Random) -> bytes:
    version, fields, tensors, end = read_gguf(data)
    kind = rng.random()
    if kind < 0.7:
        for _ in range(rng.choice((1, 1, 2))):
            _change_field(fields, rng)
    elif kind < 0.95:
        tensor = rng.choice(tensors)
        at = rng.randrange(4)
        if at == 1 and tensor[1] and rng.random() < 0.7:
            tensor[1][rng.randrange(len(tensor[1]))] = rng.choice(_NUMBERS)
        elif at == 1:
            tensor[1] = [rng.choice(_NUMBERS) for _ in range(rng.choice((0, 1, 4, 9)))]
        elif at == 0:
            tensor[0] = rng.choice((_ESCAPES, "", "x" * 70_000, rng.choice(tensors)[0]))
        else:
            tensor[at] = rng.choice((*_NUMBERS[:-1], 8, 12, 30, 1000))
    else:
        version = rng.choice((0, 1, 2, 4, 1 << 24, 2**32 - 1))
    counts = (len(tensors), len(fields)) if rng.random() < 0.95 else (rng.choice(_NUMBERS), rng.choice(_NUMBERS))
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
        value = rng.choice((*_NUMBERS, "x", _ESCAPES, "", "a" * 200_000, math.nan, -math.inf, items[0]))
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
        field[0] = rng.choice((_ESCAPES, "", rng.choice(fields)[0], "general.alignment", "x" * 70_000))
    elif kind < 0.95:
        fields.append(["general.alignment", None, rng.choice(_NUMBERS)])
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
    """Return the bytes of a file with these `fields` (key, type or None, value), `tensors` (name, dimensions, type,
    offset) and `values`; `counts` (tensors, fields): what its head says."""
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
    """The type and the value; a `kind` that does not fit the value says something that is not so."""
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


_FORMATS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".safetensors": _safetensors,
    ".packed": _packed,
    ".gguf": _gguf,
}
