"""The drop-in: everything that transformers' generate() accepts, with transformers' own output."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import specdec
from specdec.hf import SpecdecForCausalLM
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import VOCAB, prompt, tiny_model

NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tiny-gemma3")
    tiny_model("gemma3").save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def model(folder: Path) -> SpecdecForCausalLM:
    return specdec.load(folder, device="cpu")


def transformers_text(ids: torch.Tensor, **arguments: Any) -> Any:
    return tiny_model("gemma3").generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **arguments})


def everything_drafted(model: SpecdecForCausalLM, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Our output, after checking that no way of drafting changes it."""
    arguments = {"max_new_tokens": NEW, "do_sample": False, **arguments}
    plain: torch.Tensor = model.generate(ids, **arguments, speculation=False)
    for script in SCRIPTS.values():
        drafter = ScriptedDrafter(plain[0].tolist() + [3] * 20, script, VOCAB)
        drafted = model.generate(ids, **arguments, drafter=drafter, draft_length=6)
        assert torch.equal(drafted, plain)
        assert model.last_stats.drafted > 0 or plain.shape[1] == ids.shape[1] + 1
    assert torch.equal(model.generate(ids, **arguments), plain)
    return plain


GREEDY_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [9, 11], [100]]},
    "minimum length": {"eos_token_id": list(range(3, 60)), "min_new_tokens": 25},
    "suppressed": {"suppress_tokens": list(range(3, 120)), "begin_suppress_tokens": [130, 131]},
    "forced end": {"forced_eos_token_id": 5, "max_new_tokens": 30},
    "sequence bias": {"sequence_bias": {(20,): 3.0, (21, 22): 5.0}},
    "exponential decay": {"eos_token_id": 60, "exponential_decay_length_penalty": (10, 1.3)},
    "prefix function": {"prefix_allowed_tokens_fn": lambda _, ids: list(range(3 + len(ids) % 7, 250, 3))},
    "end of text": {"eos_token_id": list(range(100, 140))},
    "maximum length": {"max_new_tokens": None, "max_length": 23},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("settings", GREEDY_SETTINGS.values(), ids=list(GREEDY_SETTINGS))
def test_greedy_text_is_transformers_text(model: SpecdecForCausalLM, settings: dict[str, Any]) -> None:
    ids = prompt(20, seed=5)
    assert torch.equal(everything_drafted(model, ids, **settings), transformers_text(ids, **settings))


SAMPLED_SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8, "top_k": 0},
    "min-p": {"min_p": 0.1},
    "typical": {"typical_p": 0.7},
    "epsilon and eta": {"epsilon_cutoff": 3e-3, "eta_cutoff": 1e-3},
    "with a repetition penalty": {"temperature": 1.3, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("settings", SAMPLED_SETTINGS.values(), ids=list(SAMPLED_SETTINGS))
def test_sampled_text_depends_on_the_seed_alone(model: SpecdecForCausalLM, settings: dict[str, Any]) -> None:
    ids = prompt(20, seed=6)
    first = everything_drafted(model, ids, do_sample=True, seed=11, **settings)
    assert not torch.equal(first, everything_drafted(model, ids, do_sample=True, seed=12, **settings))


def test_without_a_seed_torch_rules(model: SpecdecForCausalLM) -> None:
    def text(manual_seed: int) -> list[int]:
        torch.manual_seed(manual_seed)
        return model.generate(prompt(9), do_sample=True, max_new_tokens=20)[0].tolist()

    assert text(1) == text(1) != text(2)


def test_stop_strings_cut_inside_a_draft(model: SpecdecForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt(20, seed=5)
    full = transformers_text(ids)
    stop = tokenizer.decode(full[0, 20 + 7 : 20 + 9])
    settings = {"stop_strings": [stop], "tokenizer": tokenizer}
    text = everything_drafted(model, ids, **settings)
    assert torch.equal(text, transformers_text(ids, **settings))
    assert text.shape[1] <= 20 + 9
    assert tokenizer.decode(text[0]).endswith(stop)


class CallCounter(StoppingCriteria):
    """Stops after so many tokens, and notes every text it was asked about."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([len(self.seen) >= self.after])


class Stateful(LogitsProcessor):
    """Forbids a token that depends on how often it was called: wrong if a row is processed twice or never."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, (self.calls * 37) % VOCAB :: 3] = -torch.inf
        return scores


def test_custom_criteria_and_stateful_processors_see_every_token_once(model: SpecdecForCausalLM) -> None:
    ids = prompt(20, seed=5)
    theirs = transformers_text(ids, logits_processor=[Stateful()], stopping_criteria=[counter := CallCounter(17)])
    for script in SCRIPTS.values():
        drafter = ScriptedDrafter(theirs[0].tolist() + [3] * 20, script, VOCAB)
        ours = model.generate(
            ids,
            do_sample=False,
            max_new_tokens=NEW,
            logits_processor=[Stateful()],
            stopping_criteria=[mine := CallCounter(17)],
            drafter=drafter,
            draft_length=5,
        )
        assert torch.equal(ours, theirs)
        assert mine.seen == counter.seen


def test_max_time_stops(model: SpecdecForCausalLM) -> None:
    text = model.generate(prompt(20), max_new_tokens=400, do_sample=False, max_time=0.05, drafter="suffix")
    assert 21 <= text.shape[1] < 420


def test_a_batch_is_each_row_alone_padded(model: SpecdecForCausalLM) -> None:
    short, long = prompt(7, seed=1), prompt(19, seed=2)
    batch = torch.cat((torch.cat((torch.zeros(1, 12, dtype=torch.long), short), dim=1), long))
    mask = torch.ones_like(batch)
    mask[0, :12] = 0
    settings = {"attention_mask": mask, "eos_token_id": list(range(100, 115)), "pad_token_id": 0}
    ours = model.generate(batch, max_new_tokens=NEW, do_sample=False, **settings)
    assert torch.equal(ours, transformers_text(batch, **settings))
    alone = model.generate(short, max_new_tokens=NEW, do_sample=False, eos_token_id=settings["eos_token_id"])
    assert ours[0, 12 : 12 + alone.shape[1]].tolist() == alone[0].tolist()
    sampled = model.generate(batch, attention_mask=mask, max_new_tokens=9, do_sample=True, seed=3)
    assert sampled[0, 12:].tolist() == model.generate(short, max_new_tokens=9, do_sample=True, seed=3)[0].tolist()


def test_returned_sequences_of_one_prompt_differ(model: SpecdecForCausalLM) -> None:
    several = model.generate(prompt(8), do_sample=True, num_return_sequences=3, max_new_tokens=16, seed=1)
    assert several.shape == (3, 24)
    assert len({tuple(row) for row in several.tolist()}) == 3


def test_scores_and_logits_are_transformers(model: SpecdecForCausalLM) -> None:
    ids = torch.cat((prompt(12, seed=3), prompt(12, seed=4)))
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.4}
    theirs = transformers_text(ids, **wanted)
    ours = model.generate(ids, max_new_tokens=NEW, do_sample=False, **wanted)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(ours.logits) == NEW
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


def test_streamers_hear_everything(
    model: SpecdecForCausalLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = prompt(10)
    text = tokenizer.decode(model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, 10:])
    model.generate(ids, max_new_tokens=NEW, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == text
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    arguments = {"inputs": ids, "max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer) == text
    thread.join()


def test_an_error_ends_the_stream(model: SpecdecForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
    with pytest.raises(ZeroDivisionError):
        model.generate(prompt(5), max_new_tokens=9, streamer=streamer, logits_processor=[lambda ids, scores: 1 / 0])
    assert list(streamer) == [""]


def test_pipeline(
    model: SpecdecForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert "not supported" not in caplog.text
    ids = prompt(10)
    [answer] = pipe(tokenizer.decode(ids[0]), max_new_tokens=12, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, 10:])


def test_generation_config_objects_and_defaults(model: SpecdecForCausalLM) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert model.generate(prompt(6), generation_config=config).shape == (1, 15)
    assert model.generate(prompt(6), generation_config=config, max_new_tokens=3).shape == (1, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams=1"),
        ({"assistant_model": object()}, "drafter="),
        ({"prompt_lookup_num_tokens": 3}, "drafter='suffix'"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attention"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden"),
        ({"past_key_values": object()}, "whole prompt"),
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "input_ids"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "text only"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"draft_length": "long"}, "draft_length"),
        ({"draft_length": -2}, "draft_length"),
        ({"do_sample": True, "seed": -1}, "seed"),
        ({"drafter": 3.5}, "a drafter is"),
        ({"drafter": "/no/such/drafter"}, "no/such/drafter"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temprature": 0.3}, "temprature"),
    ],
)
def test_what_cannot_be_done_is_refused(model: SpecdecForCausalLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(5), **{"max_new_tokens": 4, **arguments})


def test_bad_prompts_are_refused(model: SpecdecForCausalLM) -> None:
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=4)
    with pytest.raises(ValueError, match="empty"):
        model.generate(prompt(4), attention_mask=torch.zeros(1, 4, dtype=torch.long), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"600 tokens.*context of 512"):
        model.generate(prompt(600), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"0\.\.255"):
        model.generate(torch.tensor([[5, 300]]), max_new_tokens=4)


def test_the_text_ends_where_the_context_does(model: SpecdecForCausalLM) -> None:
    with pytest.warns(UserWarning, match="context of 512"):
        assert model.generate(prompt(505), max_new_tokens=50, do_sample=False).shape == (1, 512)


def test_nan_weights_are_an_error(folder: Path) -> None:
    broken = specdec.load(folder, device="cpu")
    broken.decoder.norm.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        broken.generate(prompt(5), max_new_tokens=4)


def test_forward_scores_padded_sequences(model: SpecdecForCausalLM) -> None:
    ids = torch.cat((prompt(30, seed=1), prompt(30, seed=2)))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    theirs = tiny_model("gemma3")(ids, attention_mask=mask).logits
    ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids, labels=ids).loss, tiny_model("gemma3")(ids, labels=ids).loss)
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, VOCAB)
