"""`custom_generate=specdec.speculative`: inputs and surroundings that are refused, or that change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    StaticCache,
)

from tests.support.decoding import GREEDY, SPECULATIVE, generated
from tests.support.tiny import prompt, tiny_model


def test_inputs_that_would_be_left_out_are_refused() -> None:
    model, ids = tiny_model("llama"), prompt(12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(9, seed=1), past_key_values=cache)
    longer = torch.cat((torch.full((1, 9), 7), ids), dim=1)
    refused: dict[str, dict[str, Any]] = {
        "past_key_values": {"past_key_values": cache},
        "input_ids": {"inputs_embeds": model.get_input_embeddings()(longer)},
        "position_ids": {"position_ids": torch.arange(21)[None] * 2},
        "token_type_ids": {"token_type_ids": torch.ones_like(longer)},
        "is_causal": {"is_causal": False},
    }
    for message, inputs in refused.items():
        with pytest.raises(ValueError, match=message):
            model.generate(longer, **inputs, **GREEDY, **SPECULATIVE)
    for empty in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        with pytest.raises(ValueError, match="past_key_values"):  # its owner expects it to be full afterwards
            model.generate(longer, past_key_values=empty, **GREEDY, **SPECULATIVE)


@pytest.mark.parametrize(
    "inputs",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"position_ids": torch.arange(12)[None]},
        {"attention_mask": torch.tensor([[0, 0, *[1] * 10]])},
        {"attention_mask": torch.tensor([[0, 0, *[1] * 10]]), "position_ids": torch.arange(12)[None]},
    ],
)
def test_inputs_that_change_nothing_are_taken(inputs: dict[str, Any]) -> None:
    model = tiny_model("llama")
    assert generated(model, **inputs, **SPECULATIVE) == generated(model, **inputs)


def test_autocast_may_not_ask_for_another_arithmetic() -> None:
    model = tiny_model("llama")
    outside = generated(model, **SPECULATIVE)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"outside of autocast.*model\.to"),
    ):
        generated(model, **SPECULATIVE)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = generated(half, **SPECULATIVE)
    assert generated(half, **SPECULATIVE) == inside
    assert generated(model, **SPECULATIVE) == outside


def test_a_model_for_images_too_answers_text() -> None:
    text_config = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text_config,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        **{"image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252},
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    plain = generated(model)
    assert generated(model, **SPECULATIVE) == plain
    assert generated(model, token_type_ids=torch.zeros(1, 12, dtype=torch.long), **SPECULATIVE) == plain
    with pytest.raises(ValueError, match=r"token_type_ids is not supported: images"):
        generated(model, token_type_ids=torch.ones(1, 12, dtype=torch.long), **SPECULATIVE)
    image = torch.cat((torch.full((1, 4), 250), prompt(12)), dim=1)
    with pytest.raises(ValueError, match="Images and sound of other models are not supported"):
        model.generate(image, pixel_values=torch.zeros(1, 3, 28, 28), **GREEDY, **SPECULATIVE)
    model.model.vision_tower = nn.Identity()
    with pytest.raises(ValueError, match="vision_tower is a Identity"):
        generated(model, **SPECULATIVE)


_GEMMA = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "sliding_window": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
}
