"""`generate(constraint=...)`: each row follows it, with and without drafts; processors of whole batches refuse it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import specdec
from specdec.engine.grammar import Grammar, grammar_tokens
from tests.support.tiny import VOCAB


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
