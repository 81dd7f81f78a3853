"""The seam between the server and a model's chat format: messages to a prompt, and tokens to what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from specdec.server.formats.messages import Message
from specdec.server.formats.wanted import Wanted


@dataclass(frozen=True)
class ToolCallDelta:
    """Hold a piece of a tool call. `arguments`: JSON text, a piece of it; `id` and `name` come with a call's first
    piece."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Delta:
    """Hold a piece of an answer: exactly one of the fields is set."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


class OutputParser(Protocol):
    """Take an answer's tokens as they come, and say what they mean. No sequence of tokens is an error."""

    calls: int
    """Calls that are complete."""

    cut: bool
    """Whether the answer ended within a call, of which nothing, or only a beginning, was given."""

    thoughts: int
    """Tokens of thoughts, those that are their marks included."""

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        """Return the pieces that `tokens` complete."""

    def finish(self, by_length: bool = False) -> list[Delta]:
        """Return what was held back; the answer has ended. `by_length`: it would have gone on, so that half a call is
        no content."""


class ChatFormat(Protocol):
    """Describe how a model writes conversations."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    ends: tuple[int, ...]
    """The ids of tokens that end an answer, the model's own first."""

    marks: tuple[int, ...]
    """The ids of tokens that mean something in the format, and are no text."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a conversation, ready for the answer.

        `messages` and `tools` as OpenAI's clients send them. `options`: `thinking` (True, False or None: as the
        template does by default), `chat_template_kwargs` (variables of the template, which come first) and
        `add_generation_prompt` (False: the conversation alone). Raises FieldError when it cannot be written.
        """

    def pins(self, prompt: Sequence[int]) -> list[int]:
        """Return the lengths of beginnings of `prompt` that later prompts are likely to share: the system turn with the
        tools, and everything before the last user's turn."""

    def parser(self, prompt: Sequence[int], tools: Sequence[str] = (), stream_calls: bool = True) -> OutputParser:
        """Return a parser for the answer to `prompt`.

        `tools`: the names that may be called; other calls are content. `stream_calls`: arguments come as they are
        written, which suits an answer under a constraint; otherwise each call comes whole, and one that is malformed is
        content.
        """

    def grammar(self, prompt: Sequence[int], wanted: Wanted) -> str:
        """Return the Lark grammar of the answers that `wanted` allows. Raises ValueError for a schema that has none."""
