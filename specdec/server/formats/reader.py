"""From token ids to characters and marks, as they come.

Characters are whole: one may be spread over several tokens, and the bytes of a part are held back. A mark is a token
that means something in a chat format, or, where the vocabulary has no such token, a string that does. Other special
tokens are left out.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from specdec.weights.token_bytes import vocabulary_bytes

LEAST = 3  # letters that are rather half a mark than text: "<t" may go on as "<table>"


@dataclass(frozen=True)
class Mark:
    """Hold a mark in an answer. `shown`: its text where it turns out to mean nothing."""

    name: str
    shown: str = ""


Item = str | Mark


class Marks:
    """Hold the marks of a format: those that are tokens by id, the others by their string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shown: Mapping[str, str]) -> None:
        """Look for marks in the vocabulary; `shown`: the text of each where it turns out to mean nothing."""
        added = tokenizer.added_tokens_decoder
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        ids = {token.content: i for i, token in added.items()}
        self.ids = {name: ids[name] for name in shown if name in ids}
        self.by_id = {i: Mark(name, shown[name]) for name, i in self.ids.items()}
        self.strings = tuple(name for name in shown if name not in ids)

    def reader(self) -> Reader:
        """Return a reader of one answer."""
        return Reader(vocabulary_bytes(self.tokenizer), self.by_id, self.special, self.strings)


class Reader:
    """Read one answer."""

    def __init__(
        self, pieces: Sequence[bytes], marks: Mapping[int, Mark], dropped: frozenset[int], strings: Sequence[str]
    ) -> None:
        """Read tokens of `pieces`, bytes by id: `marks` are marks, `dropped` are left out, and `strings` are marks in
        the text."""
        self._pieces, self._marks, self._dropped, self._strings = pieces, marks, dropped, strings
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # characters with which a mark could begin
        self._lengths: list[int] = []  # characters of the newest tokens, as far as some of them are held

    @property
    def undecided(self) -> int:
        """Return how many of the newest tokens may belong to a mark that has begun."""
        return len(self._lengths)

    def begun(self, mark: str) -> bool:
        """Return whether what is held back is the beginning of `mark`, `LEAST` letters of it or more."""
        return len(self._held) >= LEAST and mark.startswith(self._held)

    def feed(self, tokens: Sequence[int]) -> Iterator[Item]:
        """Yield the characters and marks that `tokens` complete."""
        for token in tokens:
            if (mark := self._marks.get(token)) is not None:
                yield from self.finish()
                yield mark
            elif token not in self._dropped and 0 <= token < len(self._pieces):
                text = self._decoder.decode(self._pieces[token])
                self._lengths.append(len(text))
                yield from self._scan(text)
                while self._lengths and sum(self._lengths[1:]) >= len(self._held):
                    self._lengths.pop(0)

    def finish(self) -> Iterator[Item]:
        """Yield what was held back, bytes that make no character as U+FFFD."""
        yield from self._scan(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        if self._held:
            yield self._held
        self._held, self._lengths = "", []

    def _scan(self, text: str) -> Iterator[Item]:
        text = self._held + text
        while found := [(at, string) for string in self._strings if (at := text.find(string)) >= 0]:
            at, string = min(found)
            if at:
                yield text[:at]
            yield Mark(string, string)
            text = text[at + len(string) :]
        held = max((overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        if len(text) > held:
            yield text[: len(text) - held]


def overlap(text: str, string: str) -> int:
    """Return the length of the longest end of `text` that `string` begins with and goes on after."""
    at = text.find(string[0], max(0, len(text) - len(string) + 1))
    while at >= 0 and not string.startswith(text[at:]):
        at = text.find(string[0], at + 1)
    return len(text) - at if at >= 0 else 0
