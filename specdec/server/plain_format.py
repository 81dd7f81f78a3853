"""The chat format of a model whose answers are plain text: its chat template, and no markup to parse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.server.detokenizer import Detokenizer
from specdec.server.fields import Fields
from specdec.server.formats.base import Delta, OutputParser
from specdec.server.history import read_messages


class PlainFormat:
    """Writes conversations by the tokenizer's chat template, and reads answers as content."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], options: Mapping[str, Any]
    ) -> list[int]:
        """Return the token ids of a conversation. Raises ValueError when the template refuses it."""
        if not self.tokenizer.chat_template:
            raise ValueError("this model has no chat template: it continues text, ask /v1/completions")
        messages = read_messages(Fields({"messages": list(messages)}))
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                add_generation_prompt=options.get("add_generation_prompt", True),
                return_dict=True,
                **options.get("chat_template_kwargs", {}),
            )
        except Exception as error:  # templates raise jinja2's kinds, and what their authors thought of
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        return list(encoded["input_ids"])

    def parser(self, prompt: Sequence[int] = ()) -> OutputParser:
        """Return a parser for one answer."""
        return PlainParser(self.tokenizer)


class PlainParser:
    """Turns tokens into content."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text = Detokenizer(tokenizer)

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        """Return the content that `tokens` complete."""
        return _content(self._text.feed(tokens))

    def finish(self) -> list[Delta]:
        """Return what was held back."""
        return _content(self._text.finish())


def _content(text: str) -> list[Delta]:
    return [Delta(content=text)] if text else []
