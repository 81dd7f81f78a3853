"""Drafting on real text, with the two real models."""

from __future__ import annotations

import pytest
import torch
from transformers import StopStringCriteria, TextIteratorStreamer

import specdec
from drafter import load_drafter
from drafter.files.bundled import bundled_head
from drafter.train.evaluate import measure_drafts
from eval.acceptance import WithoutNoise
from tests.support.scripted import SCRIPTS, ScriptedDrafter

MODELS = ["smollm2-135m-instruct", "gemma-3-270m"]
OPENINGS = [
    "The recipe for a good bean soup starts with",
    "In the winter of 1911 the harbour",
    "def largest_gap(numbers):",
    "Dear neighbours, this Saturday",
]

pytestmark = pytest.mark.model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95}])
def test_drafting_never_changes_real_text_past_the_window(name: str, sampling: dict[str, object]) -> None:
    model, tokenizer = specdec.load(name, device="cpu"), specdec.load_tokenizer(name)
    text = " ".join(f"Note {n}: the ferry left pier {n * 7 % 23} at {n % 12 + 1} o'clock." for n in range(60))
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 1024
    settings = {**sampling, "seed": 5, "max_new_tokens": 40, "eos_token_id": None}
    plain = model.generate(**inputs, **settings, speculation=False)
    suffix = model.generate(**inputs, **settings, drafter="suffix", draft_length=7)
    assert torch.equal(suffix, plain)
    assert model.last_stats.accepted > 0
    default = model.generate(**inputs, **settings)  # suffix matches, and the head where one is in the box
    assert torch.equal(default, plain)
    if name == MODELS[0]:
        head = model.generate(
            **inputs, **settings, drafter=str(bundled_head(model.decoder.fingerprint)), draft_length=4
        )
        assert torch.equal(head, plain)
        assert list(model.last_stats.draft_sources) == ["mtp"] and model.last_stats.accepted > 0
    drafter = ScriptedDrafter(plain[0].tolist(), SCRIPTS["in turn"], model.decoder.spec.vocab_size)
    assert torch.equal(model.generate(**inputs, **settings, drafter=drafter, draft_length=6), plain)


def test_a_head_that_shares_the_noise_is_right_more_often() -> None:
    model, tokenizer = specdec.load(MODELS[0], device="cpu"), specdec.load_tokenizer(MODELS[0])
    head = load_drafter(bundled_head(model.decoder.fingerprint))
    means = []
    for drafter in (head, WithoutNoise(head)):
        ids = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in OPENINGS]
        stats = measure_drafts(
            model.decoder, drafter, ids, draft_length=2, max_new_tokens=100, eos_ids=frozenset(), temperature=0.9
        )
        means.append(stats.mean_acceptance_length)
    print(f"tokens per round, temperature 0.9: {means[0]:.2f} with the noise, {means[1]:.2f} without")
    assert means[0] > 1.1 * means[1]


def test_chat_with_a_stop_string_and_a_streamer() -> None:
    model, tokenizer = specdec.load(MODELS[0], device="cpu"), specdec.load_tokenizer(MODELS[0])
    chat = [{"role": "user", "content": "Count from one to ten in words, separated by commas."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 60, "do_sample": False}
    full = tokenizer.decode(model.generate(**inputs, **settings)[0, prompt:])
    stop = full[len(full) // 2 :][:3]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    cut = model.generate(**inputs, **settings, stop_strings=[stop], tokenizer=tokenizer, streamer=streamer)
    streamed = "".join(streamer)
    assert streamed == tokenizer.decode(cut[0, prompt:])
    assert stop in streamed
    assert full.startswith(streamed)
    assert len(streamed) < len(full)
    criteria = [StopStringCriteria(tokenizer, [stop])]
    assert torch.equal(model.generate(**inputs, **settings, stopping_criteria=criteria), cut)


def test_a_real_model_that_drafts_for_itself_is_always_right() -> None:
    model, tokenizer = specdec.load(MODELS[0], drafter=MODELS[0], device="cpu"), specdec.load_tokenizer(MODELS[0])
    inputs = tokenizer(OPENINGS[2], return_tensors="pt")
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 5}):
        settings = {**sampling, "max_new_tokens": 24, "eos_token_id": None}
        plain = model.generate(**inputs, **settings, speculation=False)
        assert torch.equal(model.generate(**inputs, **settings, draft_length=4, drafter=model.drafter.other), plain)
        assert model.last_stats.draft_sources.keys() == {"model"}
        assert model.last_stats.accepted == model.last_stats.drafted > 12
    assert torch.equal(model.generate(**inputs, **settings), plain)
