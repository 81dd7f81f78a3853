"""Prompts: the project's own, and those of a user's file.

What: `default_prompts` (8, one per kind of work), `exactness_prompts` (40, every fifth one long), `load_prompts` for
JSON lines in the formats of Spec-Bench and MT-bench, chat messages, or plain text. All of the project's prompts were
written for it. Long prompts are put together from passages, each another selection in another order, so that they are
long without repeating themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from drafter.prompts.files import FORMS, entries_of, parse_line

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}, as chat templates take it."""

PASSAGES = 4  # in a long prompt
DEFAULTS = 8  # prompts.jsonl begins with the bench's own


@dataclass(frozen=True)
class Prompt:
    """Keep a prompt: `turns` are the user's, decoded one after another with the answers in between; `before` precedes
    them."""

    name: str
    task: str
    turns: tuple[str, ...]
    before: tuple[tuple[str, str], ...] = ()  # (role, content)

    def history(self) -> list[Message]:
        """Return the messages before the first turn, as a new list."""
        return [{"role": role, "content": content} for role, content in self.before]

    def opening(self) -> list[Message]:
        """Return the messages up to the first turn, that turn included."""
        return [*self.history(), {"role": "user", "content": self.turns[0]}]


def default_prompts() -> list[Prompt]:
    """Return the bench's own eight: chat, code editing, summary, JSON, mathematics, translation, rewriting, list."""
    return _own()[:DEFAULTS]


def exactness_prompts(count: int = 40) -> list[Prompt]:
    """Return the first `count` of 40 varied prompts; every fifth has 800 to 1,100 tokens, the others are short.

    Raises ValueError for more than there are.
    """
    short, long = _own(), long_prompts()
    every: list[Prompt] = []
    while short or long:
        every.extend(short[:4])
        every.extend(long[:1])
        short, long = short[4:], long[1:]
    if not 1 <= count <= len(every):
        raise ValueError(f"there are {len(every)} prompts; ask for 1 to {len(every)}, not {count}")
    return every[:count]


def foreign_prompts() -> list[Prompt]:
    """Return 80 prompts that drafters are judged on, 16 each of chat, code, maths, writing and summarising.

    They were written apart from everything that training prompts are made from.
    """
    return [parse_object(line, "") for line in _lines("foreign.jsonl")]


def suite_prompts() -> list[Prompt]:
    """Return 128 prompts, 16 each of eight tasks.

    Six tasks are those of Spec-Bench (conversations of two turns, translation, summarisation, question answering,
    mathematical reasoning, answers from retrieved passages); the others are code editing and JSON.
    """
    return [parse_object(line, "") for line in _lines("suite.jsonl")]


def long_prompts() -> list[Prompt]:
    """Return eight prompts of several passages each, with a task that draws on the passages."""
    passages, tasks = _lines("passages.jsonl"), _lines("long_tasks.jsonl")
    prompts = []
    for number, task in enumerate(tasks):
        # There are 11 passages, a prime number: any step walks over all of them before it repeats one.
        step = number % 5 + 1
        chosen = [passages[(number * 2 + i * step) % len(passages)] for i in range(PASSAGES)]
        text = "\n\n".join(f"## {p['title']}\n\n{p['text']}" for p in chosen)
        prompts.append(Prompt(f"long-{number + 1}", "long", (f"{task['before']}\n\n{text}\n\n{task['after']}",)))
    return prompts


def load_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a `.jsonl` file (one object per line, see `parse_object`) or a `.txt` file (one prompt per
    line).

    Raises:
        ValueError: no such file, another kind of file, no prompts in it, or a line that is not a prompt; the message
            names the line.
    """
    parsers: dict[str, Callable[[str, int], Prompt]] = {".jsonl": _parse_json_line, ".txt": _parse_text_line}
    if path.suffix not in parsers:
        raise ValueError(f"{path}: prompts come as .jsonl (one of {FORMS} per line) or .txt (one prompt per line)")
    prompts = []
    for number, line in enumerate(_read(path).split("\n"), start=1):  # splitlines() would cut at U+2028 in a string
        if line.strip():
            try:
                prompts.append(parsers[path.suffix](line, number))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def parse_object(value: Any, name: str) -> Prompt:
    """Return the prompt of one decoded JSON object: `prompt`, `turns` or `messages`.

    `id` or `question_id` and `category` or `task` name it, as in Spec-Bench and MT-bench; other keys are ignored.
    """
    form, entries = entries_of(value)
    name = str(value.get("id", value.get("question_id", name)))
    task = str(value.get("category", value.get("task", "")))
    if form != "messages":
        return Prompt(name, task, tuple(content for _, content in entries))
    if entries[-1][0] != "user":
        raise ValueError(f"the last message must be the user's, for the model to answer; it is {entries[-1][0]}'s")
    return Prompt(name, task, (entries[-1][1],), tuple(entries[:-1]))


def _parse_json_line(line: str, number: int) -> Prompt:
    return parse_object(parse_line(line), f"line-{number}")


def _parse_text_line(line: str, number: int) -> Prompt:
    return Prompt(f"line-{number}", "", (line.strip(),))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _own() -> list[Prompt]:
    return [parse_object(line, "") for line in _lines("prompts.jsonl")]


def _lines(name: str) -> Sequence[Any]:
    text = resources.files("eval.prompts").joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
