"""Grammars as constraints, by llguidance: Lark grammars with JSON schemas and special tokens in them.

What: `Grammar`, a constraint, and `grammar_tokens`, the vocabulary that grammars are matched against. Why llguidance:
it makes a token mask from the grammar itself, without tables made beforehand, and it knows which tokens are forced. It
is an optional dependency (the extra `serve`), imported where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.weights.token_bytes import vocabulary_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")
_SHOWN = re.compile(r"\s*(\d+ \||\^+$)")
LONGEST_PIECE = 64  # bytes of a token that a text is cut into where the tokenizer itself would change the text


class GrammarError(ValueError):
    """Report that a grammar that was compiled cannot be followed to where a text has come."""


class Grammar:
    """Constrain texts by a Lark grammar in llguidance's dialect: a text ends where nothing may follow."""

    def __init__(self, lark: str, tokens: LLTokenizer) -> None:
        """Compile `lark`. Raises ValueError for a grammar, or a JSON schema in it, that llguidance refuses."""
        llguidance = _llguidance()
        self.lark, self.tokens = lark, tokens
        self._matcher = llguidance.LLMatcher(tokens, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0)
        if self._matcher.is_error():
            raise ValueError(_reason(self._matcher.get_error()))

    def start(self) -> GrammarMatcher:
        """Return the matcher of a new text."""
        return GrammarMatcher(self._matcher.deep_copy(), self.tokens.vocab_size)


def _reason(error: str) -> str:
    """Return what llguidance says of a grammar, without the grammar's own lines."""
    lines = (line.strip() for line in error.splitlines() if not _SHOWN.match(line))
    return _PLACE.sub("", " ".join(filter(None, lines)))


class GrammarMatcher:
    """Follow one text through a grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._taken = 0  # tokens

    @property
    def ended(self) -> bool:
        """Return whether nothing may follow: the grammar ends here, or an end token was taken."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """Return which tokens may come next, [vocab] bool. Raises GrammarError where the grammar got too complex."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise self._error()
        bits = np.unpackbits(mask, count=self._vocab_size, bitorder="little")  # [vocab / 8] -> [vocab]
        return torch.from_numpy(bits).view(torch.bool)

    def _error(self) -> GrammarError:
        reason = self._matcher.get_error().partition("<state>")[0].strip()  # then comes the parser's whole state
        return GrammarError(f"the grammar cannot be followed further: {reason}; write a simpler one")

    def advance(self, token: int) -> None:
        """Take an allowed token. Raises GrammarError where the grammar got too complex."""
        if not self._matcher.consume_token(token):
            raise self._error()
        self._taken += 1

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens."""
        if self._taken > tokens:
            self._matcher.rollback(self._taken - tokens)
            self._taken = tokens

    def forced(self) -> list[int]:
        """Return the tokens that have to come next, as the tokenizer writes them."""
        return [] if self.ended else list(self._matcher.compute_ff_tokens())

    def valid(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` could follow one after the other."""
        return int(self._matcher.validate_tokens(list(tokens)))


@lru_cache(maxsize=4)
def grammar_tokens(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: tuple[int, ...], marks: tuple[int, ...] = ()
) -> LLTokenizer:
    """Return the vocabulary of `tokenizer` as llguidance takes it: a second's work, done once.

    `vocab_size`: of the model's logits, which may have more tokens. `eos_ids`: the tokens that end a text; a grammar
    allows them where it may end. Special tokens, and `marks`, match no text: a grammar names them as `<[id]>`.
    """
    llguidance = _llguidance()
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_ids, marks))
    made: LLTokenizer = llguidance.LLTokenizer(wrapper, eos_token=list(eos_ids))
    return made


class _Vocabulary:
    """Present a tokenizer under the names that llguidance asks for."""

    bos_token_id = None

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Sequence[int], marks: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_ids[0]
        added = {token for token, each in tokenizer.added_tokens_decoder.items() if each.special}
        special = {*added, *tokenizer.all_special_ids, *eos_ids, *marks}
        self.special_token_ids = sorted(token for token in special if token < vocab_size)
        known = vocabulary_bytes(tokenizer)[:vocab_size]
        self.tokens = (*known, *(vocab_size - len(known)) * (b"",))
        self._ids = {piece: token for token, piece in enumerate(known) if token not in special}

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of `text`, as the tokenizer cuts it; the longest pieces first where it changes the text."""
        found: list[int] = self._tokenizer.encode(text.decode(), add_special_tokens=False)
        if b"".join(self.tokens[token] for token in found) == text:
            return found
        tokens, at = [], 0
        while at < len(text):
            pieces = (text[at : at + length] for length in range(LONGEST_PIECE, 0, -1))
            piece = next((piece for piece in pieces if piece in self._ids), None)
            if piece is None:
                break  # a byte that no token has
            tokens.append(self._ids[piece])
            at += len(piece)
        return tokens


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            "grammars need llguidance; install it with: pip install -c constraints.txt -e '.[serve]'"
        ) from error
    return llguidance
