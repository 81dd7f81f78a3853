"""Logits processors and stopping criteria that look at the row or at the batch: what transformers' own loop gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import logits_process

import specdec
from specdec.hf.in_step import ROW_BY_ROW, needs_all_rows
from tests.support.tiny import prompt, tiny_model

ROWS, LENGTH, NEW = 3, 10, 12


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ours(theirs: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> specdec.SpecdecForCausalLM:
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return specdec.load(folder, drafter="suffix", device="cpu")


class RowBias(LogitsProcessor):
    """A bias of [B, vocab], another one for each row."""

    def __call__(self, input_ids, scores):
        bias = torch.zeros_like(scores)
        for row in range(scores.shape[0]):
            bias[row, 100 + row :: 7] = 3
        return scores + bias


class Step(LogitsProcessor):
    """Forces token 20, then 21, 22, ...: counts its calls, as processors with a plan of so many steps do."""

    def __init__(self) -> None:
        self.step = 19

    def __call__(self, input_ids, scores):
        self.step += 1
        scores[:, self.step] = 1000.0
        return scores


class Neighbour(LogitsProcessor):
    """What the row above was given as its last token is unlikely here: rows depend on each other, ended ones too."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(1, scores.shape[0]):
            scores[row, input_ids[row - 1, -1]] -= 5
        return scores


class PerRow(StoppingCriteria):
    """One flag a row, the batch size given beforehand, as lm-eval's criterion for stop sequences has it."""

    def __init__(self) -> None:
        self.done = [False] * ROWS

    def __call__(self, input_ids, scores, **kwargs):
        assert input_ids.shape[0] == ROWS
        for row, done in enumerate(self.done):
            self.done[row] = done or len(input_ids[row]) >= LENGTH + 3 + 2 * row
        return torch.tensor(self.done)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "allowed tokens by row": lambda: {"prefix_allowed_tokens_fn": lambda row, text: [50 + 10 * row, 51 + 10 * row]},
    "a bias by row": lambda: {"logits_processor": [RowBias()]},
    "a count of steps": lambda: {"logits_processor": [Step()]},
    "rows that look at each other": lambda: {"logits_processor": [Neighbour()]},
    "a function": lambda: {"logits_processor": LogitsProcessorList([lambda ids, scores: scores.roll(ids.shape[1], 1)])},
    "a criterion with a flag per row": lambda: {"stopping_criteria": [PerRow()]},
    "what was in the prompt": lambda: {"encoder_repetition_penalty": 1.5},
    "n-grams of the prompt": lambda: {"encoder_no_repeat_ngram_size": 2},
    "SynthID": lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[*range(20, 35)], ngram_len=5)},
    "a watermark": lambda: {"watermarking_config": WatermarkingConfig(bias=2.5)},
    "what rows share": lambda: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [9, 10]},
}


def batch(layout: str) -> dict[str, torch.Tensor]:
    """Three prompts, padded on the left, on the right, with a hole in each, or not at all."""
    ids = torch.stack([prompt(LENGTH, seed=row)[0] for row in range(ROWS)])
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        hidden = {"left": slice(0, row), "right": slice(LENGTH - row, None), "hole": slice(4, 4 + row)}.get(layout)
        if hidden is not None:
            mask[row, hidden] = 0
            ids[row, hidden] = 0 if layout != "hole" else 77
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("eos", [None, "met"])
@pytest.mark.parametrize("layout", ["none", "left"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_what_transformers_makes_of_it(
    theirs: PreTrainedModel, ours: specdec.SpecdecForCausalLM, case: str, layout: str, eos: str | None
) -> None:
    given = batch(layout)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if eos:  # a token that ends the second row early
        plain = theirs.generate(**given, **settings, **CASES[case]())
        settings["eos_token_id"] = int(plain[1, LENGTH + 4])
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    expected = theirs.generate(**given, **settings, **CASES[case]())
    for model, more in ((ours, {}), (theirs, {"custom_generate": specdec.speculative, "drafter": "suffix"})):
        got = model.generate(**given, **settings, **CASES[case](), **more)
        assert got.sequences.tolist() == expected.sequences.tolist()
        if case != "what rows share":  # whose rows end one by one; scores of ended rows are zeros there
            assert len(got.scores) == len(expected.scores)
            for mine, right in zip(got.scores, expected.scores, strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["right", "hole"])
@pytest.mark.parametrize("case", ["n-grams of the prompt", "what rows share", "a function"])
def test_processors_see_masked_tokens_where_they_stand(
    ours: specdec.SpecdecForCausalLM, case: str, layout: str
) -> None:
    seen: list[list[list[int]]] = []

    class Looks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.tolist())
            return scores

    given, arguments = batch(layout), CASES[case]()
    arguments["logits_processor"] = [*arguments.get("logits_processor", []), Looks()]
    out = ours.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, **arguments)
    assert seen == [out[:, : LENGTH + i].tolist() for i in range(5)]
    seen.clear()
    one = {name: tensor[2:] for name, tensor in given.items()}
    arguments = CASES[case]() | {"logits_processor": [Looks()]}
    out = ours.generate(**one, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, **arguments)
    assert seen == [out[:, : LENGTH + i].tolist() for i in range(5)], "one row alone, drafted for"


def test_sampled_rows_in_step_are_what_they_are_alone(ours: specdec.SpecdecForCausalLM) -> None:
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    given = batch("left")
    settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.9, "top_k": 0, "seed": 5, "pad_token_id": 0}
    apart = ours.generate(**given, **settings)
    assert torch.equal(ours.generate(**given, **settings, logits_processor=[Nothing()]), apart)


def test_stop_strings_without_an_end_token(
    theirs: PreTrainedModel, ours: specdec.SpecdecForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    given = batch("none")
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = theirs.generate(**given, **settings)
    stop = StopStringCriteria(tokenizer, tokenizer.batch_decode([plain[row, LENGTH + 2 + row] for row in range(2)]))
    expected = theirs.generate(**given, **settings, stopping_criteria=[stop])
    assert ours.generate(**given, **settings, stopping_criteria=[stop]).tolist() == expected.tolist()


def test_a_text_that_ends_inside_a_draft_is_asked_for_nothing_more(ours: specdec.SpecdecForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7, 8] * 6])  # suffix matches draft from the first round on
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "draft_length": 6, "eos_token_id": None}
    plain = ours.generate(ids, **settings, speculation=False)
    end = int(plain[0, 24 + 9])
    lengths: list[int] = []
    asked: list[int] = []

    class Counts(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[1])
            return scores

    class Asked(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            asked.append(input_ids.shape[1])
            return torch.zeros(1, dtype=torch.bool)

    settings["eos_token_id"] = end
    out = ours.generate(ids, **settings, logits_processor=[Counts()], stopping_criteria=[Asked()])
    assert lengths == list(range(24, out.shape[1]))
    assert asked == list(range(25, out.shape[1] + 1))


def test_a_streamer_is_given_all_rows_of_a_step(ours: specdec.SpecdecForCausalLM) -> None:
    put: list[list[int]] = []

    class Streamer:
        def put(self, tokens):
            put.append(tokens.flatten().tolist())

        def end(self):
            put.append([])

    given = batch("none")
    out = ours.generate(
        **given, max_new_tokens=4, do_sample=False, pad_token_id=0, streamer=Streamer(), logits_processor=[Step()]
    )
    assert put == [given["input_ids"].flatten().tolist(), *out[:, LENGTH:].T.tolist(), []]


def test_rows_that_do_not_fit_a_budget_in_step_are_refused(theirs: PreTrainedModel, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    model = specdec.load(tmp_path, drafter=None, device="cpu")
    room = type("Room", (), {"positions": 512, "cache": 1})()
    model.decoder.room = room
    with pytest.raises(ValueError, match="looks at all 3 rows"):
        model.generate(**batch("none"), max_new_tokens=4, pad_token_id=0, logits_processor=[Step()])
    assert model.generate(**batch("none"), max_new_tokens=4, pad_token_id=0).shape == (3, 14)


def test_every_processor_of_transformers_is_known() -> None:
    """One that a version of transformers adds is decoded in step until somebody has read it."""
    known = {one.__name__ for one in ROW_BY_ROW}
    in_step = {
        "PrefixConstrainedLogitsProcessor",  # is told the row's number
        "EncoderRepetitionPenaltyLogitsProcessor",  # hold the prompts of all rows
        "EncoderNoRepeatNGramLogitsProcessor",
        "WatermarkLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",  # pair rows, or call the model
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",  # of speech models
        "DiaEOSDelayPatternLogitsProcessor",
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
        "WhisperNoSpeechDetection",
    }
    classes = [
        one for _, one in inspect.getmembers(logits_process, inspect.isclass) if issubclass(one, LogitsProcessor)
    ]
    assert {one.__name__ for one in classes} - {"LogitsProcessor"} <= known | in_step

    class Derived(logits_process.TemperatureLogitsWarper):
        pass

    nothing = StoppingCriteriaList()
    assert not needs_all_rows([logits_process.TemperatureLogitsWarper(0.5)], nothing)
    assert needs_all_rows([Derived(0.5)], nothing), "what somebody derives may look at anything"
