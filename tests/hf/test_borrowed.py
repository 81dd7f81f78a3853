"""`custom_generate=specdec.speculative` on a model that is more than its weights is refused in a sentence."""

from __future__ import annotations

import sys
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
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama

from tests.support.decoding import SPECULATIVE, generated
from tests.support.tiny import tiny_model


@contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


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
        generated(model, **SPECULATIVE)
    assert "leave custom_generate out" in str(error.value)


def test_hooks_for_all_modules_are_refused(model: PreTrainedModel) -> None:
    handle = nn.modules.module.register_module_forward_hook(thrice)
    try:
        with pytest.raises(ValueError, match="registered for all modules"):
            generated(model, **SPECULATIVE)
    finally:
        handle.remove()
    assert generated(model, **SPECULATIVE) == generated(model)


def test_classes_and_functions_that_were_replaced_for_all_models_are_refused(model: PreTrainedModel) -> None:
    before = modeling_llama.LlamaMLP.forward
    patch = put(modeling_llama.LlamaMLP, "forward", lambda self, x: before(self, x) * 3)
    with patch, pytest.raises(ValueError, match=r"LlamaMLP.* was replaced for all models \(tests"):
        generated(model, **SPECULATIVE)

    def rope(q: Any, k: Any, *rest: Any) -> tuple[Any, Any]:
        return q, k

    patch = put(modeling_llama, "apply_rotary_pos_emb", rope)
    with patch, pytest.raises(ValueError, match="apply_rotary_pos_emb was replaced by tests"):
        generated(model, **SPECULATIVE)
    assert generated(model, **SPECULATIVE) == generated(model)


def test_tensors_of_another_library_are_refused(model: PreTrainedModel) -> None:
    class Packed(torch.Tensor):
        pass

    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj._parameters["weight"] = weight.data.as_subclass(Packed)
    with pytest.raises(ValueError, match=r"up_proj keeps its weight as a .*Packed.*quantize='int4'"):
        generated(model, **SPECULATIVE)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised by another library"):
        generated(model, **SPECULATIVE)


def test_dispatched_models_are_refused(model: PreTrainedModel) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is an extra")
    hooks.add_hook_to_module(model.model.layers[1], hooks.AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match=r"model\.layers\.1 is dispatched by accelerate.*without device_map"):
        generated(model, **SPECULATIVE)


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
        generated(model, **SPECULATIVE)
    attention.q_proj = plain

    def prepare(*given: Any, **more: Any) -> Any:
        return type(model).prepare_inputs_for_generation(model, *given, **more)

    prepare.__module__ = "peft.peft_model"
    model.prepare_inputs_for_generation = prepare
    with pytest.raises(ValueError, match="soft prompt from peft"):
        generated(model, **SPECULATIVE)
    # What peft leaves behind: the model's own method, as an attribute.
    model.prepare_inputs_for_generation = type(model).prepare_inputs_for_generation.__get__(model)
    assert generated(model, **SPECULATIVE) == generated(tiny_model("llama"))
