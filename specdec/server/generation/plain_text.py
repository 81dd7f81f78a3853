"""Text and nothing else: an answer of `/v1/completions`, and what token ids say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from specdec.server.formats.base import Delta
from specdec.server.formats.reader import Item, Marks


class PlainText:
    """Turn tokens into content: an `OutputParser` that knows no markup."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.calls, self.cut, self.thoughts = 0, False, 0
        self._reader = Marks(tokenizer, {}).reader()

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        """Return the content that `tokens` complete."""
        return _content(self._reader.feed(tokens))

    def finish(self, by_length: bool = False) -> list[Delta]:
        """Return what was held back."""
        return _content(self._reader.finish())


def _content(items: Iterable[Item]) -> list[Delta]:
    text = "".join(item for item in items if isinstance(item, str))
    return [Delta(content=text)] if text else []


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of `ids`, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
