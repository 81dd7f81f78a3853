"""Grammars as constraints: what is allowed, forced, refused; the vocabulary; texts of a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import specdec
from specdec.drafting.protocol import FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.constraints import FORCED
from specdec.engine.grammar import Grammar, GrammarError, GrammarMatcher, grammar_tokens
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.weights.token_bytes import vocabulary_bytes
from tests.support.decoding import decode, never
from tests.support.formats.tiny_chat import byte_tokenizer, gemma_tokenizer
from tests.support.tiny import VOCAB, prompt
from tests.support.tiny_decoder import quantised

SCHEMA = {
    "x-guidance": {"whitespace_flexible": False},
    "type": "object",
    "properties": {"kind": {"enum": ["first", "second"]}, "numbers": {"type": "array", "items": {"type": "integer"}}},
    "required": ["kind", "numbers"],
    "additionalProperties": False,
}


def test_bytes_of_every_kind_of_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a é漢🙂\n b"
    for one in (gemma_tokenizer(), byte_tokenizer()):
        pieces = vocabulary_bytes(one)
        assert b"".join(pieces[token] for token in one.encode(text, add_special_tokens=False)) == text.encode()
        assert pieces[one.eos_token_id] == one.eos_token.encode()
    gemma = gemma_tokenizer()
    assert vocabulary_bytes(gemma)[gemma.convert_tokens_to_ids("\u2581\u2581")] == b"  "
    assert vocabulary_bytes(tokenizer)[tokenizer.encode("x")[0]] == b"x"


def test_the_mask_the_forced_tokens_and_the_end() -> None:
    tokenizer = byte_tokenizer()
    grammar = Grammar('start: "ab" /[0-9]+/ <[3]> "c"', grammar_tokens(tokenizer, 300, (2, 0)))
    matcher = grammar.start()
    a, b, one, c = (tokenizer.encode(letter)[0] for letter in "ab1c")
    assert (list(matcher.forced()), matcher.valid([a, b, one, one, 3, c, c])) == ([a, b], 6)
    for token in (a, b, one):
        assert matcher.allowed()[token]
        matcher.advance(token)
    assert matcher.allowed().shape == (300,)
    digits = {tokenizer.encode(digit)[0] for digit in "0123456789"}
    assert {*torch.nonzero(matcher.allowed()).flatten().tolist()} == {*digits, 3}
    for token in (3, c):
        assert not matcher.ended
        matcher.advance(token)
    assert matcher.ended
    matcher.rewind(3)
    assert matcher.valid([one, 3, c]) == 3
    assert not matcher.ended
    assert grammar.start().valid([a, b]) == 2, "every text begins at the beginning"


def test_added_tokens_that_are_text_match_text_and_marks_do_not() -> None:
    gemma, tags = gemma_tokenizer(), byte_tokenizer()
    spaces = gemma.convert_tokens_to_ids("\u2581\u2581")
    assert Grammar("start: /[a ]+/", grammar_tokens(gemma, 400, (1,))).start().valid([spaces, 1]) == 2
    for marks, fits in (((), 1), ((3, 4), 0)):
        assert Grammar("start: /.+/", grammar_tokens(tags, 300, (2,), marks)).start().valid([3]) == fits


def test_end_tokens_where_the_text_may_end() -> None:
    tokenizer = byte_tokenizer()
    matcher = Grammar("start: /a+/", grammar_tokens(tokenizer, 300, (2, 0))).start()
    a = tokenizer.encode("a")[0]
    assert torch.nonzero(matcher.allowed()).flatten().tolist() == [a]
    matcher.advance(a)
    assert torch.nonzero(matcher.allowed()).flatten().tolist() == sorted([0, 2, a])
    matcher.advance(0)
    assert matcher.ended


@pytest.mark.parametrize(
    ("lark", "says"),
    [
        ('start: "a', "lexer error"),
        ('start: %json {"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('start: %json {"pattern": "(?=a)b"}', "look-around"),
    ],
)
def test_a_grammar_that_cannot_be_is_refused(lark: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Grammar(lark, grammar_tokens(byte_tokenizer(), 300, (2,)))
    assert "start" not in str(caught.value), "the reason, and not the grammar"


@pytest.mark.parametrize("seed", [None, 3], ids=["greedy", "sampled"])
def test_a_models_text_fits_and_drafts_change_nothing(tokenizer: PreTrainedTokenizerFast, seed: int | None) -> None:
    decoder = quantised("llama", "int8")
    constraint = Grammar(f"start: %json {json.dumps(SCHEMA)}", grammar_tokens(tokenizer, VOCAB, (1,)))
    sampler = Sampler() if seed is None else Sampler.at_temperature(1.0, seed)

    def ask(number: int) -> Request:
        ids = prompt(10, number)[0]
        return Request(ids, len(ids) + 120, sampler, never, constraint=constraint)

    def texts(drafter: NoDraft | SuffixDrafter, length: int, stats: GenerationStats | None = None) -> dict[int, str]:
        found = decode(decoder, drafter, FixedLength(length), map(ask, range(6)), stats, max_batch=3)
        return {number: tokenizer.decode(row[10:]) for number, row, _ in found}

    plain, stats = texts(NoDraft(), 0), GenerationStats()
    assert texts(SuffixDrafter(), 4, stats) == plain
    assert texts(NoDraft(), 7) == plain
    drafted, accepted = stats.draft_sources[FORCED]
    assert accepted > 50
    assert accepted >= drafted - 6, "the last token of a text counts as the model's own"
    ended = [text for text in plain.values() if text.endswith("}")]
    for text in ended:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert all(text.startswith('{"kind":"') for text in plain.values())
    assert seed is None or ended


def test_rows_of_a_batch_follow_a_grammar(folder: Path) -> None:
    model, tokenizer = specdec.load(folder, drafter="suffix", device="cpu"), specdec.load_tokenizer(folder)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    rule = {**schema, "x-guidance": {"whitespace_flexible": False}}
    constraint = Grammar(f"start: %json {json.dumps(rule)}", grammar_tokens(tokenizer, VOCAB, (1,)))
    inputs = tokenizer(["one", "another"], return_tensors="pt", padding=True)
    texts = []
    for more in ({"speculation": False}, {"draft_length": 4}, {}):
        rows = model.generate(**inputs, max_new_tokens=20, do_sample=False, constraint=constraint, **more)
        texts.append(tokenizer.batch_decode(rows[:, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    assert texts[0] == texts[1] == texts[2]
    assert {*texts[0]} <= {'{"a":1}', '{"a":2}'}


def test_a_processor_of_whole_batches_refuses_it(folder: Path) -> None:
    model, tokenizer = specdec.load(folder, drafter=None, device="cpu"), specdec.load_tokenizer(folder)
    constraint = Grammar('start: "a"', grammar_tokens(tokenizer, VOCAB, (1,)))

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    inputs = tokenizer(["one", "two"], return_tensors="pt")
    with pytest.raises(ValueError, match="one prompt at a time"):
        model.generate(**inputs, max_new_tokens=4, constraint=constraint, logits_processor=[processor])


class Complex:
    """A matcher of llguidance whose parser has got too complex."""

    def compute_bitmask(self) -> bytes:
        return np.zeros(8, np.uint8).tobytes()

    def is_error(self) -> bool:
        return True

    def get_error(self) -> str:
        return "Parser Error: too many items <state>\n...</state>"

    def consume_token(self, token: int) -> bool:
        return False


def test_a_grammar_that_gets_too_complex_says_so_in_a_sentence() -> None:
    complex_one: Any = Complex()
    matcher = GrammarMatcher(complex_one, 64)
    for ask in (matcher.allowed, lambda: matcher.advance(3)):
        with pytest.raises(GrammarError, match=r"cannot be followed further: Parser Error: too many items; write a"):
            ask()


def test_without_its_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    no_tokens: Any = None
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"grammars need llguidance; install it with: pip install .*serve"):
        Grammar("start: /a/", no_tokens)
