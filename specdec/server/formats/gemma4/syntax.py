"""Gemma 4's syntax for the arguments of a call: to JSON, piece by piece, and from values.

    {key:<|"|>text<|"|>,n:42,b:true,x:null,o:{k:1},a:[1,2]}

Keys are bare, and strings stand between two marks that are one token each, so that no character needs an escape. Two
things are this project's own: a key with a character of the syntax in it stands between the marks too, and a reader
takes what the grammars of `schema.py` allow, and spaces outside of strings.
"""

from __future__ import annotations

import json
import re
from typing import Any

from specdec.server.formats.answer import Call, MalformedError
from specdec.server.formats.reader import Item, Mark

QUOTE = '<|"|>'
PLAIN_KEY = r"[^\s:,{}\[\]\"<>][^\r\n\t:,{}\[\]\"<>]*"
_KEY = re.compile(PLAIN_KEY)
_LITERAL = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null")
_CALL = "call:"


def written(value: Any) -> str:
    """Return `value`, of JSON's types, in Gemma's syntax, with sorted keys as in Gemma's template."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{written_key(key)}:{written(value[key])}" for key in in_order(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def written_key(key: str) -> str:
    """Return a key as it stands in an object."""
    return key if _KEY.fullmatch(key) and key == key.strip() else f"{QUOTE}{key}{QUOTE}"


def in_order(keys: dict[str, Any]) -> list[str]:
    """Return keys in the order of the template: without regard to case."""
    return sorted(keys, key=str.lower)


class ArgumentsReader:
    """Turn an object in Gemma's syntax into JSON text, as it comes."""

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []  # the brackets that are open
        self._state = "value"  # what comes next: key, colon, value, after, string, quoted key, bare
        self._bare = ""  # a key or a literal, as far as it was read
        self._empty = False  # the innermost bracket was just opened

    def feed(self, item: Item) -> str:
        """Return the JSON text that `item` completes. Raises MalformedError."""
        if isinstance(item, Mark):
            return self._mark(item)
        if self._state == "string":
            return json.dumps(item, ensure_ascii=False)[1:-1]
        if self._state == "quoted key":
            self._bare += item
            return ""
        return "".join(map(self._character, item))

    def _mark(self, mark: Mark) -> str:
        if mark.name != QUOTE:
            raise MalformedError
        if self._state == "string":
            self._state = "after"
            return '"'
        if self._state == "quoted key":
            key, self._bare, self._state = self._bare, "", "colon"
            return json.dumps(key, ensure_ascii=False)
        if self._bare.strip() or not self._open:
            raise MalformedError
        if self._state == "key":
            self._bare, self._state = "", "quoted key"
            return ""
        if self._state != "value":
            raise MalformedError
        self._state, self._empty = "string", False
        return '"'

    def _character(self, char: str) -> str:
        if self.done:
            if char.isspace():
                return ""
            raise MalformedError
        return getattr(self, f"_in_{self._state}")(char)  # type: ignore[no-any-return]

    def _in_key(self, char: str) -> str:
        if char == ":":
            key, self._bare, self._state = self._bare.strip(), "", "value"
            if not _KEY.fullmatch(key):
                raise MalformedError
            self._empty = False
            return json.dumps(key, ensure_ascii=False) + ":"
        if char == "}" and self._empty and not self._bare.strip():
            return self._close(char)
        self._bare += char
        return ""

    def _in_colon(self, char: str) -> str:
        if char.isspace():
            return ""
        if char != ":":
            raise MalformedError
        self._state, self._empty = "value", False
        return ":"

    def _in_value(self, char: str) -> str:
        if char.isspace():
            return ""
        if char == "{" or (char == "[" and self._open):
            self._open.append(char)
            self._state, self._empty = "key" if char == "{" else "value", True
            return char
        if char == "]" and self._empty and self._open[-1] == "[":
            return self._close(char)
        if not self._open:
            raise MalformedError
        self._bare, self._state, self._empty = char, "bare", False
        return ""

    def _in_bare(self, char: str) -> str:
        if char not in ",}]":
            self._bare += char
            return ""
        literal, self._bare = self._bare.strip(), ""
        if not _LITERAL.fullmatch(literal):
            raise MalformedError
        self._state = "after"
        return literal + self._in_after(char)

    def _in_after(self, char: str) -> str:
        if char.isspace():
            return ""
        if char == ",":
            self._state = "key" if self._open[-1] == "{" else "value"
            return char
        return self._close(char)

    def _close(self, char: str) -> str:
        if {"}": "{", "]": "["}.get(char) != self._open[-1]:
            raise MalformedError
        self._open.pop()
        self._state, self._empty, self._bare = "after", False, ""
        self.done = not self._open
        return char


class GemmaCall:
    """Read one call: `call:NAME{arguments}`."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._head = ""
        self._arguments = ArgumentsReader()
        self._pieces: list[str] = []

    def feed(self, item: Item) -> str:
        """Return the JSON text of arguments that `item` completes. Raises MalformedError."""
        if self.name is None:
            if not isinstance(item, str):
                raise MalformedError
            self._head += item
            head, bracket, rest = self._head.partition("{")
            head = head.lstrip()
            if not (head.startswith(_CALL) or (_CALL.startswith(head) and not bracket)):
                raise MalformedError
            if not bracket:
                return ""
            self.name, item = head.removeprefix(_CALL).strip(), bracket + rest
        piece = self._arguments.feed(item)
        self._pieces.append(piece)
        return piece

    def close(self) -> list[Call]:
        """Return the call. Raises MalformedError where it is not complete."""
        if self.name is None or not self._arguments.done:
            raise MalformedError
        return [Call(self.name, "".join(self._pieces))]
