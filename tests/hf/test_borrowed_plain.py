"""`custom_generate=specdec.speculative` on a model that is its weights, whatever was done to it: its own text."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, TextIteratorStreamer

import specdec
from specdec.hf import decoder_of
from specdec.hf.plain_model import refuse_more_than_weights
from specdec.model.families import decoder_spec
from tests.support.decoding import SPECULATIVE, generated
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import FAMILIES, VOCAB, prompt, tiny_model
from tests.support.tiny_folder import tiny_tokenizer

NEW = 40


def observed(model: PreTrainedModel) -> None:
    model(prompt(4), output_hidden_states=True, output_attentions=True)  # leaves hooks of transformers' own
    model.enable_input_require_grads()


def training(model: PreTrainedModel) -> None:
    model.train()


def untied(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


def resized(model: PreTrainedModel) -> None:
    model.resize_token_embeddings(300)


def noted(model: PreTrainedModel) -> None:
    model.note = lambda: 1
    model.model.layers[0].note = "mine"
    model.generate = model.generate


def copied(model: PreTrainedModel) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])


@pytest.mark.parametrize("change", [observed, training, untied, resized, noted, copied])
def test_what_changes_nothing_is_taken(model: PreTrainedModel, change: Callable[[PreTrainedModel], None]) -> None:
    change(model)
    assert generated(model, **SPECULATIVE) == generated(model)


def test_a_compiled_forward_is_the_models_own(model: PreTrainedModel) -> None:
    model.forward = torch.compile(model.forward, backend="eager")
    assert generated(model, **SPECULATIVE) == generated(tiny_model("llama"))
    assert generated(torch.compile(tiny_model("llama")), **SPECULATIVE) == generated(tiny_model("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rotations_are_those_of_the_model(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model.to(dtype)  # rounds or widens the frequencies too, which are no weights
    found = decoder_of(model).spec.ropes["full_attention"].frequencies
    assert list(found) == model.model.rotary_emb.inv_freq.float().tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_plain_as_transformers_makes_it(family: str) -> None:
    model = tiny_model(family)
    refuse_more_than_weights(model)
    spec = decoder_of(model).spec
    assert spec == decoder_spec(model.config)
    # Not the looks of a text: the noise of a sampled one comes from torch's global generator.
    state = torch.random.get_rng_state()
    refuse_more_than_weights(copy.deepcopy(model))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_check_is_fast() -> None:
    model = tiny_model("gemma4")
    refuse_more_than_weights(model)
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        refuse_more_than_weights(model)
        best = min(best, time.perf_counter() - start)
    modules = len(list(model.modules()))
    assert best < 100e-6 * modules, f"{best * 1e3:.1f} ms for {modules} modules"


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
