"""Which compiled grammars are kept."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.engine import grammar
from specdec.server.formats.constraint import Compiled
from tests.support.formats.tiny_chat import byte_tokenizer


@pytest.fixture(scope="module")
def tokens() -> Any:
    return grammar.grammar_tokens(byte_tokenizer(), 300, (2,))


def lark(word: str) -> str:
    return f'start: "{word}"\n'


def test_the_grammars_that_were_used_last_are_kept(tokens: Any) -> None:
    compiled = Compiled(most=2)
    first = compiled(lark("a"), tokens)
    compiled(lark("b"), tokens)
    assert compiled(lark("a"), tokens) is first
    compiled(lark("c"), tokens)
    assert compiled.kept == (lark("a"), lark("c"))


def test_the_letters_of_all_kept_grammars_are_bounded(tokens: Any) -> None:
    compiled = Compiled(letters=200)
    for word in ("a" * 80, "b" * 80, "c" * 80):
        compiled(lark(word), tokens)
    assert compiled.kept == (lark("b" * 80), lark("c" * 80))
    assert compiled(lark("d" * 300), tokens).lark == lark("d" * 300)
    assert compiled.kept == (lark("b" * 80), lark("c" * 80)), "one that is too long takes nobody's place"


def test_a_grammar_that_is_refused_is_not_kept(tokens: Any) -> None:
    compiled = Compiled()
    with pytest.raises(ValueError, match="unknown"):
        compiled("start: other\n", tokens)
    assert compiled.kept == ()
