"""Damage to bodies of requests: to their structure above all, and to their bytes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

from eval.fuzz.damage import change, change_bytes, places
from eval.serve.fuzz.good import GOOD

_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_LONGEST = 4  # tokens of an answer, where the damage leaves room for a limit
_JSON = "application/json"
_TYPES = ("text/plain", "", "application/json; charset=utf-16", "application/x-www-form-urlencoded", "\xff/\xfe")
# What a schema can ask for that a grammar cannot keep, or not in any time.
_SCHEMAS: tuple[Any, ...] = (
    *({"pattern": "(a+)+$"}, {"pattern": "(?=x)y"}, {"pattern": "["}, {"maxLength": 10**9}, {"minItems": 10**6}),
    *({"type": "string", "pattern": "a{1,100000}"}, {"type": "string", "minLength": 5, "maxLength": 3}),
    *({"$ref": "#"}, {"$ref": "#/x"}, {"$ref": "http://127.0.0.1:9/x"}, {"$ref": "file:///etc/passwd"}),
    *({"allOf": [{"$ref": "#"}]}, {"anyOf": []}, {"enum": []}, {"type": "x"}, True, False),
    {"type": ["string", "null"]},
    *({"type": "number", "multipleOf": 1e-300}, {"type": "integer", "minimum": 10**400}, {"const": {"a": [1] * 50}}),
    *({"enum": list(range(3000))}, {"x-guidance": {"whitespace_pattern": "("}}, {"format": "date"}, {"not": {}}),
    {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(300)}},
    {"patternProperties": {"^(x|y)*$": {"type": "string"}}, "type": "object"},
    {"type": "object", "properties": {"a" * 3000: {}, "\n": {}, '"': {}, "\u2028": {}}, "required": ['"', "zz"]},
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *(2**64, -(2**63), 10**400, 1e308, -0.0, 1e-320, 2, 3, "auto", "required", "json_schema"),
    *("user", "tool", "function", "data:,x", "x" * 70_000),
    *("\udfff", "\x00", "\u202e", "<|im_start|>", "<tool_call>", "\U0010ffff", "{", '{"a":' * 300),
    *("data:image/png;base64,AAAA", {"type": "image"}, {"type": "audio", "audio": "data:;base64,AA"}, {"1": 1}),
    ["x"] * 17,
    *([[]], [""], [None], {"": {}}, {"role": "user"}, {"chat_template": "{% for x in range(9**9) %}{% endfor %}"}),
)  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """Hold a request that is sent: the path, the body, and what the body is declared as."""

    path: str
    body: bytes
    kind: str = _JSON


def damaged(seed: int, number: int) -> Sent:
    """Return the `number`th damaged request of a seed: always the same one."""
    rng = Random(f"{seed}-{number}")
    good = rng.choice(GOOD)
    kind = _JSON if rng.random() < 0.99 else rng.choice(_TYPES)
    tree: Any = deepcopy(good.body)
    if rng.random() < 0.02:
        tree = deepcopy(rng.choice(_VALUES))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = _change(tree, rng)
    text = json.dumps(limited(tree, rng), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05 and isinstance(tree, dict) and tree:
        value = json.dumps(rng.choice(_VALUES))
        text = f"{text[:-1]}, {json.dumps(rng.choice(list(tree)))}: {value}}}"
    return Sent(good.path, _bytes(text, rng), kind)


def _change(tree: Any, rng: Random) -> Any:
    chance = rng.random()
    if chance < 0.5 and isinstance(tree, (dict, list)):
        change(tree, rng)
        return tree
    found = list(places(tree)) if isinstance(tree, (dict, list)) else []
    schemas = [
        one for one in found if one[1] in ("schema", "parameters", "input_schema", "properties", "items", "anyOf")
    ]
    if chance < 0.75 and schemas:
        holder, key = rng.choice(schemas)
        holder[key] = deepcopy(rng.choice(_SCHEMAS))
    elif chance < 0.9 and found:
        holder, key = rng.choice(found)
        holder[key] = deepcopy(rng.choice(_VALUES))
    elif isinstance(tree, dict):
        other = rng.choice(GOOD).body  # a field of another protocol, perhaps
        name = rng.choice(list(other))
        tree[name] = deepcopy(other[name])
    return tree


def limited(tree: Any, rng: Random | None = None) -> Any:
    """Return `tree` with a limit where it has none: thousands of answers to the end of the context take hours."""
    if isinstance(tree, dict) and not any(_is_small(tree.get(name)) for name in _LIMITS):
        name = "max_completion_tokens" if rng is None or tree.keys() & {*_LIMITS} else rng.choice(_LIMITS)
        tree[name] = _LONGEST if rng is None else rng.randint(1, _LONGEST)
    return tree


def _is_small(limit: Any) -> bool:
    return type(limit) is int and 0 < limit <= _LONGEST


def _bytes(text: str, rng: Random) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    chance = rng.random()
    if chance < 0.85:
        return raw
    if chance < 0.95:
        return change_bytes(raw, rng)
    return rng.choice(_encodings(text, raw))


def _encodings(text: str, raw: bytes) -> Sequence[bytes]:
    coded = (text.encode(name, "surrogatepass") for name in ("utf-16", "utf-16-le", "utf-32"))
    wrapped = (
        b"\xef\xbb\xbf" + raw,
        raw + b"\x00",
        raw + raw,
        b"[" * 500 + raw,
        b'{"a":' * 2000,
        b"",
        gzip.compress(raw, mtime=0),
    )
    return (*coded, *wrapped, text.encode("latin-1", "replace"))
