"""An answer that is text and nothing else, as `/v1/completions` gives it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from specdec.server.formats.base import Delta
from specdec.server.generation.detokenizer import Detokenizer


class PlainText:
    """Turns tokens into content: an `OutputParser` that knows no markup."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.calls, self.cut = 0, False
        self._text = Detokenizer(tokenizer)

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        """Return the content that `tokens` complete."""
        return _content(self._text.feed(tokens))

    def finish(self, by_length: bool = False) -> list[Delta]:
        """Return what was held back."""
        return _content(self._text.finish())


def _content(text: str) -> list[Delta]:
    return [Delta(content=text)] if text else []
