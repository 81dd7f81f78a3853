"""Every setting of `generate`: known, in whatever type it comes, and refused where it cannot be honoured."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

import specdec
from specdec.hf import SpecdecForCausalLM
from specdec.hf.settings import OBEYED, REFUSED, WITHOUT_EFFECT, make_plain, refuse_unsupported
from tests.support.tiny import prompt, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpecdecForCausalLM:
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    return specdec.load(folder, drafter="suffix", device="cpu")


def test_every_setting_of_transformers_is_known() -> None:
    """A name missing here is new in this transformers: read what it does, and put it into a table of settings.py."""
    names = set(vars(GenerationConfig()))
    assert names <= OBEYED | REFUSED.keys() | WITHOUT_EFFECT.keys()
    assert not OBEYED & REFUSED.keys()
    assert not (OBEYED | REFUSED.keys()) & WITHOUT_EFFECT.keys()


def test_every_argument_of_generate_is_known() -> None:
    """As above, for what `generate` takes by itself: a new one may need an error in `SpecdecForCausalLM.generate`."""
    known = ["self", "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"]
    known += ["synced_gpus", "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask"]
    assert list(inspect.signature(GenerationMixin.generate).parameters) == [*known, "custom_generate", "kwargs"]


def test_what_has_no_effect_has_none(model: SpecdecForCausalLM) -> None:
    config = GenerationConfig(
        max_new_tokens=8,
        early_stopping=True,
        length_penalty=2.0,
        use_cache=False,
        prefill_chunk_size=4,
        disable_compile=True,
        num_assistant_tokens=3,
        assistant_confidence_threshold=0.9,
        max_matching_ngram_size=3,
        cache_implementation="static",
        max_cache_len=64,
    )
    expected = model.generate(prompt(9), max_new_tokens=8)
    assert torch.equal(model.generate(prompt(9), generation_config=config), expected)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_beams", 2),
        ("num_beam_groups", 2),
        ("constraints", [object()]),
        ("force_words_ids", [[3]]),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("prompt_lookup_num_tokens", 0),
        ("assistant_early_exit", 2),
        ("use_mtp", True),
        ("is_assistant", True),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("cache_implementation", "quantized"),
        ("cache_implementation", "paged"),
    ],
)
def test_what_is_refused_says_what_to_do(model: SpecdecForCausalLM, setting: str, value: Any) -> None:
    def asked(**more: Any) -> None:
        with pytest.raises(ValueError, match=setting):
            model.generate(prompt(5), **{"max_new_tokens": 3, **more})

    asked(**{setting: value})
    config = GenerationConfig(max_new_tokens=3)
    setattr(config, setting, value)
    with pytest.raises(ValueError, match=setting):
        refuse_unsupported(config)
    before = getattr(model.generation_config, setting, None)
    setattr(model.generation_config, setting, value)  # as a generation_config.json may have it
    try:
        asked()
        asked(generation_config=GenerationConfig(max_new_tokens=3))
    finally:
        setattr(model.generation_config, setting, before)
    assert setting in REFUSED


def test_an_assistant_is_refused_by_place_too(model: SpecdecForCausalLM) -> None:
    with pytest.raises(ValueError, match="drafter="):
        model.generate(prompt(5), None, None, None, None, None, tiny_model("llama"))


# Types

FORMS: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda value: np.asarray(value)[()],
    "torch": torch.tensor,
    "python": lambda value: value,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 4},
    "max_length": {"max_length": 14},
    "min_new_tokens": {"max_new_tokens": 9, "min_new_tokens": 5, "eos_token_id": [*range(3, 90)]},
    "eos_token_id": {"max_new_tokens": 9, "eos_token_id": 91},
    "eos_token_ids": {"max_new_tokens": 9, "eos_token_id": [*range(40, 200)]},
    "pad_token_id": {"max_new_tokens": 4, "pad_token_id": 0},
    "suppress_tokens": {"max_new_tokens": 4, "suppress_tokens": [*range(3, 200)]},
    "begin_suppress_tokens": {"max_new_tokens": 4, "begin_suppress_tokens": [*range(3, 200)]},
    "repetition_penalty": {"max_new_tokens": 9, "repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"max_new_tokens": 9, "no_repeat_ngram_size": 2},
    "num_return_sequences": {"max_new_tokens": 4, "num_return_sequences": 1},
    "num_beams": {"max_new_tokens": 4, "num_beams": 1},
}


@pytest.mark.parametrize("form", ["numpy", "torch"])
@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_of_numpy_and_torch_are_numbers(model: SpecdecForCausalLM, name: str, form: str) -> None:
    ids, theirs = prompt(10), tiny_model("llama")
    wrapped = {key: FORMS[form](value) for key, value in SETTINGS[name].items()}
    expected = theirs.generate(ids, do_sample=False, **SETTINGS[name])
    assert torch.equal(model.generate(ids, do_sample=False, **wrapped), expected)
    config = GenerationConfig(do_sample=False)
    for key, value in wrapped.items():
        setattr(config, key, value)
    assert torch.equal(model.generate(ids, generation_config=config), expected)
    try:
        theirs.generate(ids, do_sample=False, **wrapped)
    except (TypeError, ValueError, RuntimeError):
        return  # transformers itself does not take this one: a borrowed model's processors are transformers'
    borrowed = theirs.generate(ids, do_sample=False, **wrapped, custom_generate=specdec.speculative, drafter="suffix")
    assert torch.equal(borrowed, expected)


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_our_own_settings_take_numbers_of_numpy_and_torch(model: SpecdecForCausalLM, form: str) -> None:
    ids, wrap = prompt(10), FORMS[form]
    asked: dict[str, Any] = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    expected = model.generate(ids, **asked, seed=7, draft_length=3)
    got = model.generate(
        ids, **{name: wrap(value) for name, value in asked.items()}, seed=wrap(7), draft_length=wrap(3)
    )
    assert torch.equal(got, expected)
    assert torch.equal(model.generate(ids, **asked, seed=wrap(7), speculation=wrap(False)), expected)
    for wrong in ({"seed": wrap(1.5)}, {"seed": wrap(-1)}, {"draft_length": wrap(1.5)}, {"draft_length": wrap([1, 2])}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.generate(ids, **{**asked, **wrong})


def test_nested_numbers_and_attributes_of_ones_own(model: SpecdecForCausalLM) -> None:
    config = GenerationConfig(max_new_tokens=4, bad_words_ids=[[np.int64(9)], [3, torch.tensor(4)]])
    config.note = note = object()
    config.sequence_bias = {(np.int64(20),): np.float32(3.0)}
    expected = model.generate(prompt(9), max_new_tokens=4, bad_words_ids=[[9], [3, 4]], sequence_bias={(20,): 3.0})
    assert torch.equal(model.generate(prompt(9), generation_config=config), expected)
    assert config.note is note
    make_plain(config)
    assert config.bad_words_ids == [[9], [3, 4]]
    assert [type(token) for words in config.bad_words_ids for token in words] == [int, int, int]
    assert config.note is note


# Modes of torch


@contextlib.contextmanager
def grad(enabled: bool) -> Iterator[None]:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(enabled)
    yield
    torch.set_grad_enabled(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "bfloat16 autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16 autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference": torch.inference_mode,
    "no inference": lambda: torch.inference_mode(False),
    "no gradients": torch.no_grad,
    "gradients": lambda: grad(True),
    "gradients off": lambda: grad(False),
    "deterministic": deterministic,
}


@pytest.mark.parametrize(("family", "kv_dtype"), [("llama", "bfloat16"), ("gemma3", None)])
def test_the_text_does_not_depend_on_modes_of_torch(family: str, kv_dtype: str | None, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    model = specdec.load(tmp_path, drafter="suffix", device="cpu", kv_dtype=kv_dtype)
    for number, mode in enumerate(MODES.values()):
        ids = prompt(30, seed=number)
        asked: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "draft_length": 3}
        expected = model.generate(ids, **asked, reuse=False, speculation=False)
        scores = model(expected).logits
        with mode():
            assert torch.equal(model.generate(ids, **asked), expected)
            assert torch.equal(model(expected).logits, scores)
        asked["max_new_tokens"] = 24  # goes on from the cache that was made inside
        longer = model.generate(expected, **asked)
        assert torch.equal(longer, model.generate(expected, **asked, reuse=False))
