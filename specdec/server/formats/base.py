"""The seam between the server and a model's chat format: messages to a prompt, and tokens to what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call. `arguments`: JSON text, a piece of it; `id` and `name` come with a call's first piece."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: exactly one of the fields is set."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


class OutputParser(Protocol):
    """Takes an answer's tokens as they come, and says what they mean."""

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        """Return the pieces that `tokens` complete."""

    def finish(self) -> list[Delta]:
        """Return what was held back; the answer has ended."""


class ChatFormat(Protocol):
    """How a model writes conversations."""

    def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], options: Mapping[str, Any]
    ) -> list[int]:
        """Return the token ids of a conversation, ready for the answer. Raises ValueError when it cannot be written."""

    def parser(self, prompt: Sequence[int]) -> OutputParser:
        """Return a parser for the answer to `prompt`."""
