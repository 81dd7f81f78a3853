"""`specdec.speculative`: the loop in a model that transformers loaded, by way of `custom_generate`."""

from __future__ import annotations

import pytest
import torch
from transformers import TextIteratorStreamer

import specdec
from specdec.hf import decoder_of
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import VOCAB, prompt, tiny_model
from tests.support.tiny_folder import tiny_tokenizer

NEW = 40


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4_unified", "qwen3"])
def test_it_decodes_a_model_that_transformers_loaded(family: str) -> None:
    theirs, ids = tiny_model(family), prompt(20, seed=8)
    plain = theirs.generate(ids, max_new_tokens=NEW, do_sample=False)
    drafter = ScriptedDrafter(plain[0].tolist() + [3] * 20, SCRIPTS["in turn"], VOCAB)
    ours = theirs.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=False,
        custom_generate=specdec.speculative,
        drafter=drafter,
        draft_length=5,
    )
    assert torch.equal(ours, plain)
    assert theirs.last_stats.accepted > 0


def test_it_feeds_and_ends_a_streamer() -> None:
    tokenizer = tiny_tokenizer()
    theirs, ids = tiny_model("llama"), prompt(20, seed=8)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    text = theirs.generate(
        ids, max_new_tokens=9, do_sample=False, custom_generate=specdec.speculative, drafter="suffix", streamer=streamer
    )
    assert "".join(streamer) == tokenizer.decode(text[0, 20:])


def test_it_shares_the_parameters() -> None:
    theirs = tiny_model("llama")
    decoder = decoder_of(theirs)
    assert decoder.layers[0].gate.weight.tensor.data_ptr() == theirs.model.layers[0].mlp.gate_proj.weight.data_ptr()
