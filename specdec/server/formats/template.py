"""From messages to token ids through a chat template, with text that stays text.

A template's own special tokens become tokens. The same characters in somebody's message must not: a file that contains
`<|im_end|>` would end its turn. They are set aside before the template sees them, and then
encoded in two parts, so that no token is the whole string.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.server.formats.messages import FieldError, Message

_ASIDE = ("\U0010fffe", "\U0010ffff")  # noncharacters: no text may contain them
# What is called so is no variable: a template of a stranger's, say, which need never end.
_OWN = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"kwargs"} | {"messages"}
_SET_ASIDE = re.compile(f"{_ASIDE[0]}([0-9]+){_ASIDE[1]}")


class Template:
    """Render the chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: Sequence[str] = ()) -> None:
        """Take the tokenizer's own template. `marks`: strings besides special tokens that are tokens of the format."""
        self.tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted({*added, *tokenizer.all_special_tokens, *marks}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def source(self, tools: Sequence[Message] = ()) -> str:
        """Return the template's text, or an empty one where there is none."""
        try:
            return str(self.tokenizer.get_chat_template(tools=list(tools) or None))
        except ValueError:
            return ""

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Message], variables: Mapping[str, Any], prompt: bool = True
    ) -> list[int]:
        """Return the token ids of a conversation; `prompt`: with the beginning of the answer. Raises FieldError where
        the template refuses the messages."""
        if taken := sorted(_OWN & {*variables}):
            raise FieldError(f"chat_template_kwargs.{taken[0]}", "is no variable of the chat template")
        aside: list[str] = []
        given = [self._without_special(message, aside) for message in messages]
        offered = [self._without_special(tool, aside) for tool in tools]
        try:
            text = self.tokenizer.apply_chat_template(
                given, tools=offered or None, add_generation_prompt=prompt, tokenize=False, **variables
            )
        except Exception as error:  # templates raise jinja2's kinds, and what their authors thought of
            raise FieldError("messages", f"the model's chat template refuses them: {error}") from error
        ids: list[int] = []
        for i, part in enumerate(_SET_ASIDE.split(str(text))):
            if i % 2:
                # Cut after its first character, so that no token of the vocabulary is the whole.
                part = aside[int(part)]
                ids += self._encode(part[:1]) + self._encode(part[1:])
            elif part:
                ids += self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _without_special(self, value: Any, aside: list[str]) -> Any:
        """Return `value` with every special string in it set aside."""
        if isinstance(value, str):
            for one in _ASIDE:
                value = value.replace(one, "\ufffd")
            if self._special is None:
                return value

            def put(found: re.Match[str]) -> str:
                aside.append(found[0])
                return f"{_ASIDE[0]}{len(aside) - 1}{_ASIDE[1]}"

            return self._special.sub(put, value)
        if isinstance(value, Mapping):
            return {
                self._without_special(key, aside): self._without_special(each, aside) for key, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._without_special(each, aside) for each in value]
        return value


def turn_pins(prompt: Sequence[int], turn: int, user: int) -> list[int]:
    """Return where the second turn and the last user's turn begin, in a prompt whose turns begin with `turn`."""
    starts = [i for i, token in enumerate(prompt) if token == turn]
    users = [i for i in starts if i + 1 < len(prompt) and prompt[i + 1] == user]
    return sorted({*starts[1:2], *users[-1:]} - {0})
