"""`custom_generate=specdec.speculative` on a model that is more than its weights: its own text, or a sentence."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AttentionInterface,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.llama import modeling_llama

import specdec
from specdec.hf import decoder_of
from specdec.hf.plain_model import refuse_more_than_weights
from specdec.model.families import decoder_spec
from tests.support.tiny import FAMILIES, prompt, tiny_model

OURS: dict[str, Any] = {"custom_generate": specdec.speculative, "drafter": "suffix"}
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def text(model: PreTrainedModel, **more: Any) -> list[int]:
    return model.generate(prompt(12), **GREEDY, **more)[0].tolist()  # type: ignore[no-any-return]


@pytest.fixture
def model() -> PreTrainedModel:
    """A model of its own, to be changed."""
    return copy.deepcopy(tiny_model("llama"))


@contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# What changes a model's answer


class Thrice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


class Tripled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 3


def thrice(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
    return out * 3


def hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(thrice)


def pre_hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, given: (given[0] * 3,))


def patched_forward(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    before = mlp.forward
    mlp.forward = lambda x: before(x) * 3


def patched_root(model: PreTrainedModel) -> None:
    before = model.forward

    def doubled(**inputs: Any) -> Any:
        out = before(**inputs)
        out.logits = -out.logits
        return out

    model.forward = doubled


def parametrization(model: PreTrainedModel) -> None:
    parametrize.register_parametrization(model.model.layers[1].mlp.down_proj, "weight", Tripled())


def pruned(model: PreTrainedModel) -> None:
    prune.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", amount=0.5)


def other_class(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.down_proj.__class__ = Thrice


def other_activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def other_norm(model: PreTrainedModel) -> None:
    model.model.norm = nn.LayerNorm(64)


def fewer_layers(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:-1]


def repeated_layer(model: PreTrainedModel) -> None:
    model.model.layers[2] = model.model.layers[1]


def wrapped_layer(model: PreTrainedModel) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.Softplus())


def new_bias(model: PreTrainedModel) -> None:
    model.lm_head.bias = nn.Parameter(torch.randn(256))


def other_scaling(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 3


def both_ways(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.is_causal = False


def other_epsilon(model: PreTrainedModel) -> None:
    model.model.norm.variance_epsilon = 3.0


def other_config(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps = 0.5


def dropout(model: PreTrainedModel) -> None:
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = model.config.attention_dropout = 0.5


def checkpointing(model: PreTrainedModel) -> None:
    model.train()
    model.gradient_checkpointing_enable()  # transformers' text is another one then


def mixed_dtypes(model: PreTrainedModel) -> None:
    model.model.norm.to(torch.float64)


def own_attention(model: PreTrainedModel) -> None:
    def mine(module: nn.Module, q: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(q.transpose(1, 2)), None

    AttentionInterface.register("mine", mine)
    model.set_attn_implementation("mine")


CHANGES: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "hook": (hook, r"model\.layers\.1\.mlp has the forward hook .*thrice: remove it"),
    "pre-hook": (pre_hook, r"model\.layers\.1\.mlp has the forward hook"),
    "patched forward": (patched_forward, r"layers\.1\.mlp has another forward\(\) than its class"),
    "patched forward of the whole": (patched_root, r"the model itself has another forward\(\)"),
    "parametrization": (parametrization, r"parametrization of weight.*remove_parametrizations"),
    "pruning": (pruned, r"down_proj has the forward hook"),
    "another class": (other_class, r"down_proj is a tests.hf.test_borrowed.Thrice"),
    "another activation": (other_activation, r"act_fn is a GELU instead of a SiLU"),
    "another norm": (other_norm, r"model.norm is a LayerNorm instead of a LlamaRMSNorm"),
    "fewer layers": (fewer_layers, r"model.layers.3 is missing"),
    "a repeated layer": (repeated_layer, r"layers\.2\.self_attn\.layer_idx is 1"),
    "a wrapped head": (wrapped_layer, r"lm_head is a Sequential instead of a Linear"),
    "a bias": (new_bias, r"lm_head has other tensors .*bias"),
    "attention's scale": (other_scaling, r"layers\.0\.self_attn\.scaling is"),
    "attention both ways": (both_ways, r"layers\.0\.self_attn\.is_causal is False"),
    "a norm's epsilon": (other_epsilon, r"model\.norm\.variance_epsilon is 3"),
    "a config that moved on": (other_config, r"variance_epsilon is .* where its config makes it 0.5"),
    "dropout": (dropout, r"model\.eval\(\)"),
    "gradient checkpointing": (checkpointing, r"gradient checkpointing: call model\.eval\(\)"),
    "weights of two dtypes": (mixed_dtypes, r"float32, torch.float64: convert"),
    "another attention": (own_attention, r"attention 'mine' is .*set_attn_implementation"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=list(CHANGES))
def test_what_is_not_in_the_weights_is_refused(
    model: PreTrainedModel, change: Callable[[PreTrainedModel], None], message: str
) -> None:
    change(model)
    with pytest.raises(ValueError, match=message) as error:
        text(model, **OURS)
    assert "leave custom_generate out" in str(error.value)


def test_hooks_for_all_modules_are_refused(model: PreTrainedModel) -> None:
    handle = nn.modules.module.register_module_forward_hook(thrice)
    try:
        with pytest.raises(ValueError, match="registered for all modules"):
            text(model, **OURS)
    finally:
        handle.remove()
    assert text(model, **OURS) == text(model)


def test_classes_and_functions_that_were_replaced_for_all_models_are_refused(model: PreTrainedModel) -> None:
    before = modeling_llama.LlamaMLP.forward
    patch = put(modeling_llama.LlamaMLP, "forward", lambda self, x: before(self, x) * 3)
    with patch, pytest.raises(ValueError, match=r"LlamaMLP.* was replaced for all models \(tests"):
        text(model, **OURS)

    def rope(q: Any, k: Any, *rest: Any) -> tuple[Any, Any]:
        return q, k

    patch = put(modeling_llama, "apply_rotary_pos_emb", rope)
    with patch, pytest.raises(ValueError, match="apply_rotary_pos_emb was replaced by tests"):
        text(model, **OURS)
    assert text(model, **OURS) == text(model)


def test_tensors_of_another_library_are_refused(model: PreTrainedModel) -> None:
    class Packed(torch.Tensor):
        pass

    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj._parameters["weight"] = weight.data.as_subclass(Packed)
    with pytest.raises(ValueError, match=r"up_proj keeps its weight as a .*Packed.*quantize='int4'"):
        text(model, **OURS)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised by another library"):
        text(model, **OURS)


def test_dispatched_models_are_refused(model: PreTrainedModel) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is an extra")
    hooks.add_hook_to_module(model.model.layers[1], hooks.AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match=r"model\.layers\.1 is dispatched by accelerate.*without device_map"):
        text(model, **OURS)


def test_adapters_are_refused_until_they_are_merged(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What peft does, without peft: layers of its own around Linear, and an input preparation of its own."""
    peft = ModuleType("peft.layers")

    class Linear(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.base_layer = inner
            self.lora = nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.lora(x)

    Linear.__module__ = "peft.layers"
    peft.Linear = Linear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft.layers", peft)
    attention = model.model.layers[0].self_attn
    plain, attention.q_proj = attention.q_proj, Linear(attention.q_proj)
    with pytest.raises(ValueError, match=r"q_proj is a Linear of peft: .*merge_and_unload\(\)"):
        text(model, **OURS)
    attention.q_proj = plain

    def prepare(*given: Any, **more: Any) -> Any:
        return type(model).prepare_inputs_for_generation(model, *given, **more)

    prepare.__module__ = "peft.peft_model"
    model.prepare_inputs_for_generation = prepare
    with pytest.raises(ValueError, match="soft prompt from peft"):
        text(model, **OURS)
    # What peft leaves behind: the model's own method, as an attribute.
    model.prepare_inputs_for_generation = type(model).prepare_inputs_for_generation.__get__(model)
    assert text(model, **OURS) == text(tiny_model("llama"))


# What comes from outside


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
            model.generate(longer, **inputs, **GREEDY, **OURS)
    for empty in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        with pytest.raises(ValueError, match="past_key_values"):  # its owner expects it to be full afterwards
            model.generate(longer, past_key_values=empty, **GREEDY, **OURS)


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
    assert text(model, **inputs, **OURS) == text(model, **inputs)


def test_autocast_may_not_ask_for_another_arithmetic() -> None:
    model = tiny_model("llama")
    outside = text(model, **OURS)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"outside of autocast.*model\.to"),
    ):
        text(model, **OURS)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = text(half, **OURS)
    assert text(half, **OURS) == inside
    assert text(model, **OURS) == outside


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
    plain = text(model)
    assert text(model, **OURS) == plain
    assert text(model, token_type_ids=torch.zeros(1, 12, dtype=torch.long), **OURS) == plain
    with pytest.raises(ValueError, match=r"token_type_ids is not supported: images"):
        text(model, token_type_ids=torch.ones(1, 12, dtype=torch.long), **OURS)
    image = torch.cat((torch.full((1, 4), 250), prompt(12)), dim=1)
    with pytest.raises(ValueError, match="images are not supported"):
        model.generate(image, pixel_values=torch.zeros(1, 3, 28, 28), **GREEDY, **OURS)
    model.model.vision_tower = nn.Identity()
    with pytest.raises(ValueError, match="vision_tower is a Identity"):
        text(model, **OURS)


_GEMMA = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "sliding_window": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
}


# What does not change a model's answer


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
    assert text(model, **OURS) == text(model)


def test_a_compiled_forward_is_the_models_own(model: PreTrainedModel) -> None:
    model.forward = torch.compile(model.forward, backend="eager")
    assert text(model, **OURS) == text(tiny_model("llama"))
    assert text(torch.compile(tiny_model("llama")), **OURS) == text(tiny_model("llama"))


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
