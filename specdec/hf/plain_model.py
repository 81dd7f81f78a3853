"""The check that a transformers model computes what its weights and its config say, and nothing else.

The loop reads weights and runs a decoder of its own. Whatever else changes a model's answer (adapters, hooks, patched
methods, replaced layers, a module's changed settings) would be left out in silence. So the model is compared, module by
module, with the model that transformers makes of the same config, on the meta device and without weights. The code of
both has to be transformers' and torch's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_LIBRARIES = tuple(str(Path(str(library.__file__)).parent) + os.sep for library in (transformers, torch))
_USUAL_PACKAGES = sys.stdlib_module_names | {"transformers", "torch", "typing_extensions", "accelerate", "kernels"}
# Hooks of transformers' own that only look: at hidden states that were asked for, and at what needs a gradient.
_HOOKS_THAT_LOOK = {"output_capturing_hook", "make_inputs_require_grads"}
# Methods that others replace on a model without touching its arithmetic; `generate` is on the way to here.
_BESIDES_ARITHMETIC = {"generate", "to", "cuda", "cpu", "train", "eval", "state_dict", "save_pretrained", "push_to_hub"}
# What changes in use: the mode, and how far transformers' tables of rotations go.
_STATES = {"training", "gradient_checkpointing", "name_or_path", "vocab_size", "max_seq_len_cached"}
_SETTING = (bool, int, float, str, type(None))
_LEAVE_OUT = "or leave custom_generate out"


def refuse_more_than_weights(model: PreTrainedModel) -> None:
    """Raise a ValueError that names the first thing besides weights and config that changes what `model` computes."""
    reason = next(_reasons(model), None)
    if reason is not None:
        name = type(model).__name__
        raise ValueError(f"custom_generate=specdec.speculative computes with the weights of {name} alone, and {reason}")


def patches(module: nn.Module) -> Iterator[str]:
    """Yield a description of each hook and replaced method of `module` itself that changes its forward pass."""
    own = vars(module)
    if "_hf_hook" in own:
        yield "is dispatched by accelerate: load the model on one device, without device_map"
        return
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if not (getattr(hook, "__name__", "") in _HOOKS_THAT_LOOK and _of_the_libraries(hook)):
            yield f"has the forward hook {_name(hook)}: remove it (the handle's remove())"
    for name in own.keys() & _methods(type(module)):
        value = own[name]
        if _replaces_method(module, name, value):
            owner = _name(value)
            if owner.startswith("peft."):
                yield "gets a soft prompt from peft, which is in no weight: use the model's own generate()"
            else:
                yield f"has another {name}() than its class, {owner}: delete that attribute (del module.{name})"


def _reasons(model: PreTrainedModel) -> Iterator[str]:
    for hooks in (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks):
        for hook in hooks.values():
            yield f"the forward hook {_name(hook)} is registered for all modules: remove it, {_LEAVE_OUT}"
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for reason in (*_foreign(module), *patches(module)):
            yield f"{_where(name)} {reason}, {_LEAVE_OUT}"
    for kind in {type(module) for module in modules.values()}:
        yield from _changed_class(kind)
    for code in {type(module).__module__ for module in modules.values()}:
        yield from _changed_functions(code)
    yield from _attention(model)
    yield from _differences(model, modules)
    for name, module in modules.items():
        if module.training and _dropout(module):
            yield f"{_where(name)} drops out at random: call model.eval(), {_LEAVE_OUT}"
        if module.training and vars(module).get("gradient_checkpointing"):
            yield f"{_where(name)} keeps no cache, for gradient checkpointing: call model.eval(), {_LEAVE_OUT}"


def _foreign(module: nn.Module) -> Iterator[str]:
    """Yield a description of `module` where its class, or that of one of its tensors, is neither transformers' nor
    torch's."""
    kind = type(module)
    if "parametrizations" in module._modules:
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        yield f"has a parametrization of {names}: make it final with torch.nn.utils.parametrize.remove_parametrizations"
    elif kind.__module__.startswith("peft."):
        yield f"is a {kind.__name__} of peft: merge it into the weights first (model = model.merge_and_unload())"
    elif kind.__module__ == "torch._dynamo.eval_frame":
        yield "is compiled: compile the whole model (torch.compile(model)), or nothing of it"
    elif getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind or not _library(kind):
        yield f"is a {kind.__module__}.{kind.__qualname__}, which is not transformers' own code: put the original back"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor):
            what = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
            yield f"keeps its {name} as a {what}: load the original with specdec.load(..., quantize='int4')"


def _changed_class(kind: type[nn.Module]) -> Iterator[str]:
    for method in (kind.forward, kind.__call__):
        if not _of_the_libraries(method):
            yield (
                f"{kind.__name__}.{method.__name__} was replaced for all models ({_name(method)}): start without that "
                f"patch, {_LEAVE_OUT}"
            )


def _changed_functions(module: str) -> Iterator[str]:
    """Yield the functions and classes in a file of transformers that another library (Liger, for one) has replaced."""
    if not module.startswith("transformers.models."):
        return
    for name, value in vars(sys.modules[module]).items():
        is_code = inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module))
        if is_code and value.__module__.partition(".")[0] not in _USUAL_PACKAGES:
            yield f"{module}.{name} was replaced by {_name(value)}: start without that patch, {_LEAVE_OUT}"


def _attention(model: PreTrainedModel) -> Iterator[str]:
    text = model.config.get_text_config(decoder=True)
    for name in {str(config._attn_implementation or "eager") for config in (model.config, text)}:
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            function = table.get(name)
            if function is not None and not _of_the_libraries(function):
                yield (
                    f"its attention {name!r} is {_name(function)}, not transformers' own: "
                    f"model.set_attn_implementation('sdpa'), {_LEAVE_OUT}"
                )


class _Plain(NamedTuple):
    """Hold a module of a fresh model: its class, its settings, and the names of its tensors."""

    kind: type
    settings: dict[str, Any]
    tensors: frozenset[str]


def _differences(model: PreTrainedModel, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield each difference between `model` and a model that transformers makes of the same config."""
    fresh = _fresh(_Blueprint(model))
    for name, plain in fresh.items():
        module = modules.get(name)
        if module is None:
            yield f"{_where(name)} is missing, which its config says it has: keep config and layers alike, {_LEAVE_OUT}"
            continue
        if type(module) is not plain.kind:
            yield (
                f"{_where(name)} is a {type(module).__name__} instead of a {plain.kind.__name__}: put the original "
                f"back, {_LEAVE_OUT}"
            )
        for key, value in plain.settings.items():
            now = vars(module).get(key, value)
            if not isinstance(now, _SETTING) or now != value:
                yield (
                    f"{_where(name)}.{key} is {now!r}, where its config makes it {value!r}: keep config and model "
                    f"alike, {_LEAVE_OUT}"
                )
        if (tensors := _tensors(module)) != plain.tensors:
            names = ", ".join(sorted(tensors ^ plain.tensors))
            yield (
                f"{_where(name)} has other tensors than its config makes ({names}): put the original back, {_LEAVE_OUT}"
            )
    for name in modules.keys() - fresh.keys():
        yield f"{_where(name)} is there besides what its config says: take it out, {_LEAVE_OUT}"


class _Blueprint:
    """Name the class and the config of a model, as a key: equal when the class and all values of the config are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.kind, self.config = type(model), model.config
        self._all = (self.kind, self.config.to_json_string(use_diff=False), str(self.config._attn_implementation))

    def __hash__(self) -> int:
        return hash(self._all)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Blueprint) and self._all == other._all


@lru_cache(8)
def _fresh(blueprint: _Blueprint) -> dict[str, _Plain]:
    """Return every module of a new model of this class and config, by name."""
    with torch.device("meta"):
        model = blueprint.kind(copy.deepcopy(blueprint.config))
    return {
        name: _Plain(type(module), _settings(module), _tensors(module))
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name[0] != "_" and name not in _STATES and isinstance(value, _SETTING)
    }


def _tensors(module: nn.Module) -> frozenset[str]:
    every = (*module._parameters.items(), *module._buffers.items())
    return frozenset(name for name, tensor in every if tensor is not None)


def _dropout(module: nn.Module) -> bool:
    share = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
    return isinstance(share, float) and share > 0


_method_names: dict[type, frozenset[str]] = {}


def _methods(kind: type) -> frozenset[str]:
    """Return the names of a class's methods, but for `_BESIDES_ARITHMETIC`."""
    if kind not in _method_names:
        callables = (name for name in dir(kind) if callable(getattr(kind, name, None)))
        _method_names[kind] = frozenset(callables) - _BESIDES_ARITHMETIC
    return _method_names[kind]


def _replaces_method(module: nn.Module, name: str, value: Any) -> bool:
    """Return whether `value`, an attribute of `module` itself, is another method than that of its class."""
    method = inspect.getattr_static(type(module), name)
    value = getattr(value, "_torchdynamo_orig_callable", value)  # model.forward = torch.compile(model.forward)
    return not (getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is method)


def _library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("transformers", "torch")


def _of_the_libraries(function: Callable[..., Any]) -> bool:
    """Return whether the code of `function`, and of all that it wraps, is in transformers' or torch's files."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is not None and not code.co_filename.startswith(_LIBRARIES):
        return False
    if code is None and not _library(type(function)) and type(function).__module__ != "builtins":
        return False
    wrapped = getattr(function, "__wrapped__", None)
    return wrapped is None or _of_the_libraries(wrapped)


def _where(name: str) -> str:
    return name or "the model itself"


def _name(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
