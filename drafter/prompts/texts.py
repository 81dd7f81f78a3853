"""Chats that were written already: read as they are, and not answered again."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from drafter.prompts.files import entries_of, parse_file, parse_line

_FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class Chat(NamedTuple):
    """Keep a conversation: `messages` are (role, content), of which the last is the assistant's; `where`: its file and
    line."""

    messages: tuple[tuple[str, str], ...]
    where: str


def read_chats(path: Path) -> list[Chat]:
    """Read the chats of a `.jsonl` file, one object with `messages` a line. The whole file is read at once, so that a
    bad line does not come to light after hours.

    Raises:
        ValueError: the file cannot be read, holds no chats, or has a line that is none; the message names the line.
    """
    chats = parse_file(path, lambda line, number: Chat(_messages(line), f"{path}, line {number}"))
    if not chats:
        raise ValueError(f"{path}: holds no chats; each line is {_FORM}")
    return chats


def _messages(line: str) -> tuple[tuple[str, str], ...]:
    form, messages = entries_of(parse_line(line))
    if form != "messages" or messages[-1][0] != "assistant":
        raise ValueError(
            f"a chat that is read as it is ends with the assistant's answer: {_FORM}; name prompts with --data"
        )
    return tuple(messages)
