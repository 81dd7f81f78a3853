"""What a mistyped word was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 100  # letters; comparing takes time that grows with the square, and nobody mistypes a longer name


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?", of the one of `known` that is nearest to `word`; "" where none is near."""
    names = {name.casefold(): name for name in known}
    near = get_close_matches(word.casefold(), names, n=1) if len(word) <= _LONGEST else []
    return f" Did you mean {names[near[0]]}?" if near else ""
