"""From token ids to text, as they come: characters whole, and nothing of a stop string.

A character may be spread over several tokens, and a stop string over several rounds. What could still change is held
back. The pieces add up to what decoding all tokens at once gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


class Detokenizer:
    """Turns one text's tokens into characters; special tokens are left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._ids: list[int] = []  # those of the last piece, which decide how the next one begins, and those held back
        self._emitted = 0  # how many of them were emitted

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the characters that `tokens` complete."""
        self._ids += [token for token in tokens if token not in self._special]
        whole = self._decode(self._ids)
        if whole.endswith(_UNFINISHED):
            return ""
        return self._emit(whole)

    def finish(self) -> str:
        """Return what was held back: bytes that make no character, as U+FFFD."""
        return self._emit(self._decode(self._ids))

    def _emit(self, whole: str) -> str:
        before = self._decode(self._ids[: self._emitted])
        if len(self._ids) > self._emitted:
            self._ids = self._ids[self._emitted :]
            self._emitted = len(self._ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids) if ids else ""


class StopStrings:
    """Cuts a text where the first of several strings begins, and holds back what could be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = [string for string in strings if string]
        self.found: str | None = None
        self._held = ""

    def feed(self, text: str) -> str:
        """Return the part of the text so far that no stop string can reach; `found` is set when one has come."""
        if not self.strings or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        places = [(text.find(string), -len(string), string) for string in self.strings if string in text]
        if places:
            place, _, self.found = min(places)
            self._held = ""
            return text[:place]
        held = max(_overlap(text, string) for string in self.strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: the text has ended before a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest end of `text` that `string` begins with."""
    for length in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of `ids`, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=4)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that are left out of a text."""
    return frozenset(tokenizer.all_special_ids)
