"""Damage to files of each format that is read, for `python -m eval.fuzz`.

What: `damage` changes one file in place. Most changes are of its structure (a value of another kind, a number that is
too large, a key gone or twice, a length that is forged), for these reach the code behind the parser; a few are of its
bytes. Where a format keeps checksums of its own (packed files), they are made right again, as an attacker would. Of
pictures, sound and video only bytes are changed. Left out: files that are large because they are large.
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

from eval.fuzz.damage_gguf import damage_gguf
from eval.fuzz.values import ESCAPES, strange

RAW = 0.15  # of cases: bytes are changed without regard to their meaning


def damage(path: Path, rng: Random) -> None:
    """Change the file `path`, whose suffix names its format."""
    data = path.read_bytes()
    made = change_bytes(data, rng) if rng.random() < RAW else _FORMATS.get(path.suffix, change_bytes)(data, rng)
    path.unlink()  # it may be a link to the file that was whole
    path.write_bytes(made)


def change_bytes(data: bytes, rng: Random) -> bytes:
    """Cut, stretch or overwrite `data`, without regard to what it means."""
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
        found = list(places(tree))
        if not found:
            return
        holder, key = rng.choice(found)
        kind = rng.random()
        if kind < 0.65:
            holder[key] = strange(rng)
        elif kind < 0.75:
            del holder[key]
        elif kind < 0.85:
            other, its = rng.choice(found)
            holder[key] = deepcopy(other[its]) if its in other or isinstance(other, list) else None
        elif kind < 0.92 and isinstance(holder, dict):
            holder[rng.choice((ESCAPES, "x", "to_dict", "auto_map", "num_labels", "__class__"))] = strange(rng)
        elif isinstance(holder[key], list) and holder[key]:
            holder[key] = holder[key] * rng.choice((0, 2, 3)) if rng.random() < 0.7 else holder[key][:-1]
        elif isinstance(holder[key], (int, float)):
            holder[key] = -holder[key] if rng.random() < 0.3 else holder[key] + rng.choice((1, -1, 7))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return where values stand inside `tree`: (holder, key). A long list gives only some of its places, or nothing
    else were ever changed."""
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


_FORMATS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".safetensors": _safetensors,
    ".packed": _packed,
    ".gguf": damage_gguf,
}
