"""The bytes that each token of a vocabulary stands for, which may be a part of a character alone.

Why: a decoder turns whole texts into characters. Grammars and streams need to know what a single token adds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how sentencepiece writes a space


@lru_cache(maxsize=4)
def vocabulary_bytes(tokenizer: PreTrainedTokenizerBase) -> tuple[bytes, ...]:
    """Return the bytes of every token by id, those of added tokens included; none of an id that has no token.

    Of three kinds of vocabularies each is known by its decoder: byte-level, sentencepiece's, and plain characters.
    """
    longest = max(tokenizer.get_vocab().values(), default=-1)  # ids may have gaps
    pieces = tokenizer.convert_ids_to_tokens(list(range(longest + 1)))
    added = tokenizer.added_tokens_decoder
    read = _reader(tokenizer)
    # Added tokens of a byte-level vocabulary are plain text. Those of sentencepiece write their spaces like all others.
    plain = str.encode if read is _byte_level else read
    return tuple((plain if token in added else read)(piece or "") for token, piece in enumerate(pieces))


def _reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    kinds = {*_kinds(tokenizer)}
    if "ByteLevel" in kinds:
        return _byte_level
    return _sentencepiece if not kinds or kinds & {"Metaspace", "ByteFallback", "Replace"} else str.encode


def _kinds(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the kinds of the decoder's parts; none where the tokenizer has no decoder of the `tokenizers` library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return []
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


def _byte_level(piece: str) -> bytes:
    byte_of = _byte_of_letter()
    if all(letter in byte_of for letter in piece):
        return bytes(byte_of[letter] for letter in piece)
    return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace(_SPACE, " ").encode()


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}
