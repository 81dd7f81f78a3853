"""Prompts as people keep them: JSON lines in the forms of Spec-Bench and MT-bench, or chat messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from specdec.util.text import check_text

ROLES = ("system", "user", "assistant")
FORMS = '{"prompt": "..."}, {"turns": ["...", ...]} or {"messages": [{"role": "user", "content": "..."}]}'

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class TrainingPrompt:
    """Keep a prompt: `messages` are (role, content) as chat templates take them; the last message is the user's."""

    kind: str
    messages: tuple[tuple[str, str], ...]


def parse_file(path: Path, parse: Callable[[str, int], Parsed]) -> list[Parsed]:
    """Return what `parse` makes of each line of the file `path`, given the line and its number; empty lines are passed
    over.

    Raises:
        ValueError: the file cannot be read, or `parse` refuses a line; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut at U+2028 in a string
        if line.strip():
            try:
                found.append(parse(line, number))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return found


def parse_line(line: str) -> Any:
    """Return the JSON value of a line.

    Raises:
        ValueError: the line is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); one object per line") from None
    except RecursionError:
        raise ValueError("not a prompt: nested too deeply") from None


def entries_of(value: Any) -> tuple[str, list[tuple[str, str]]]:
    """Return the form of an object, and its (role, content) entries, at least one.

    Raises:
        ValueError: `value` is not an object of one of the forms.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, one of {FORMS}")
    present = [key for key in ("prompt", "turns", "messages") if key in value]
    if len(present) != 1:
        raise ValueError(f"expected exactly one of prompt, turns and messages, found {present or 'none'}: {FORMS}")
    form = present[0]
    if form == "prompt":
        return form, [("user", _text(value[form], form))]
    entries = value[form]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{form} must be a list with at least one entry")
    if form == "turns":
        return form, [("user", _text(turn, f"turns[{i}]")) for i, turn in enumerate(entries)]
    return form, [_message(entry, f"messages[{i}]") for i, entry in enumerate(entries)]


def _message(entry: Any, where: str) -> tuple[str, str]:
    if not isinstance(entry, dict) or entry.get("role") not in ROLES:
        raise ValueError(f'{where} must be {{"role": one of {", ".join(ROLES)}, "content": "..."}}')
    return entry["role"], _text(entry.get("content"), f"{where}.content")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must be text that is not empty, got {json.dumps(value, ensure_ascii=False)[:60]}")
    check_text(value, where)
    return value
