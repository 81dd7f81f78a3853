"""The family table: a transformers config in, a `DecoderSpec` out.

transformers stays the source of configs. One function per family says what its config means; an architecture that
is not in the table is an error that lists those that are. Sizes and conventions were read from transformers 5.22's
modeling files and are held to them by tests/test_parity.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specdec.model.spec import Activation, DecoderSpec, LayerSpec, RopeSpec

Config = Any  # a transformers PreTrainedConfig: its attributes differ from family to family

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


def decoder_spec(config: Config) -> DecoderSpec:
    """The spec of the text decoder that `config` describes.

    Raises:
        ValueError: the architecture, or a feature of it (experts, an unusual rope or activation), is not supported.
    """
    text = config.get_text_config(decoder=True)
    family = _FAMILIES.get(text.model_type)
    if family is None:
        raise ValueError(
            f"architecture {text.model_type!r} is not supported; supported are: {', '.join(sorted(_FAMILIES))}"
        )
    return family(text)


def supported_families() -> tuple[str, ...]:
    """The `model_type` of every text config that `decoder_spec` accepts."""
    return tuple(sorted(_FAMILIES))


def _llama(config: Config) -> DecoderSpec:
    return _plain(config, qkv_bias=config.attention_bias, output_bias=config.attention_bias, mlp_bias=config.mlp_bias)


def _qwen2(config: Config) -> DecoderSpec:
    return _plain(config, qkv_bias=True)


def _qwen3(config: Config) -> DecoderSpec:
    return _plain(config, qk_norm=True, qkv_bias=config.attention_bias, output_bias=config.attention_bias)


def _plain(config: Config, **features: Any) -> DecoderSpec:
    """Llama's shape, which Qwen shares: pre-norm, one rope, one head size."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = tuple(
        LayerSpec(
            kind=kind,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            intermediate_size=config.intermediate_size,
            window=config.sliding_window if kind == "sliding_attention" else None,
        )
        for kind in kinds
    )
    return DecoderSpec(
        **_common(config, layers), attention_scale=head_dim**-0.5, activation=_activation(config.hidden_act), **features
    )


def _gemma3(config: Config) -> DecoderSpec:
    _refuse(config, "use_bidirectional_attention", "attn_logit_softcapping")
    layers = tuple(
        LayerSpec(
            kind=kind,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            window=config.sliding_window if kind == "sliding_attention" else None,
        )
        for kind in config.layer_types
    )
    return DecoderSpec(
        **_common(config, layers),
        attention_scale=config.query_pre_attn_scalar**-0.5,
        activation=_activation(config.hidden_activation),
        embed_scale=math.sqrt(config.hidden_size),
        norm_offset=1.0,
        sandwich_norms=True,
        qk_norm=True,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        final_softcap=config.final_logit_softcapping,
    )


def _gemma4(config: Config) -> DecoderSpec:
    _refuse(config, "enable_moe_block")
    if getattr(config, "use_bidirectional_attention", None) == "all":
        raise ValueError("use_bidirectional_attention='all' makes an encoder of this model; it cannot generate text")
    layers = gemma4_layers(config)
    width = getattr(config, "hidden_size_per_layer_input", 0) or 0
    return DecoderSpec(
        **_common(config, layers),
        attention_scale=1.0,
        activation=_activation(config.hidden_activation),
        embed_scale=math.sqrt(config.hidden_size),
        sandwich_norms=True,
        qk_norm=True,
        v_norm=True,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        layer_scalar=True,
        final_softcap=config.final_logit_softcapping,
        per_layer_input=width,
        per_layer_vocab=config.vocab_size_per_layer_input if width else 0,
    )


def gemma4_layers(config: Config) -> tuple[LayerSpec, ...]:
    """The layers of a Gemma 4 text config: two head sizes, K=V full layers, shared K/V, wide shared MLPs."""
    count = config.num_hidden_layers
    own_kv = count - (getattr(config, "num_kv_shared_layers", 0) or 0)
    source = {kind: i for i, kind in enumerate(config.layer_types[:own_kv])}
    layers = []
    for i, kind in enumerate(config.layer_types):
        shares = i >= own_kv
        wide = shares and own_kv > 0 and getattr(config, "use_double_wide_mlp", False)
        layers.append(
            LayerSpec(
                kind=kind,
                heads=config.num_attention_heads,
                kv_heads=_layer_value(config, i, "num_key_value_heads"),
                head_dim=_layer_value(config, i, "head_dim"),
                intermediate_size=config.intermediate_size * (2 if wide else 1),
                window=config.sliding_window if kind == "sliding_attention" else None,
                values_from_keys=config.attention_k_eq_v and kind == "full_attention",
                kv_layer=source.get(kind) if shares else None,
            )
        )
    return tuple(layers)


def _layer_value(config: Config, index: int, name: str) -> int:
    """A size that full layers may override: `per_layer_config` since transformers 5.21, `global_*` before it."""
    if hasattr(config, "per_layer_config"):
        return int(getattr(config.per_layer_config[index], name))
    if config.layer_types[index] == "full_attention":
        override = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}[name]
        if name == "head_dim" or config.attention_k_eq_v:
            return int(getattr(config, override, None) or getattr(config, name))
    return int(getattr(config, name))


def _common(config: Config, layers: tuple[LayerSpec, ...]) -> dict[str, Any]:
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "layers": layers,
        "ropes": {layer.kind: rope_spec(config, layer.kind, layer.head_dim) for layer in layers},
        "norm_eps": config.rms_norm_eps,
        "max_positions": config.max_position_embeddings,
        "tied_head": bool(config.tie_word_embeddings),
    }


def rope_spec(config: Config, kind: str, head_dim: int) -> RopeSpec:
    """Frequencies of `kind`, for `head_dim` dimensions, in float32 as transformers computes them."""
    parameters = config.rope_parameters
    nested = kind in parameters
    if nested:
        parameters = parameters[kind]
    rope_type = parameters.get("rope_type", "default")
    dims = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim  # [D / 2]
    if rope_type in ("default", "linear"):
        frequencies, factor = 1.0 / (parameters["rope_theta"] ** dims), 1.0
        if rope_type == "linear":
            frequencies = frequencies / parameters["factor"]
    elif rope_type == "proportional":
        rotated = int(parameters.get("partial_rotary_factor", 1.0) * head_dim // 2)
        frequencies, factor = 1.0 / (parameters["rope_theta"] ** dims) / parameters.get("factor", 1.0), 1.0
        frequencies[rotated:] = 0.0
    elif rope_type in ("llama3", "yarn") and not nested:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    else:
        raise ValueError(
            f"rope type {rope_type!r} is not supported; supported are: default, linear, proportional, llama3, yarn"
        )
    return RopeSpec(tuple(frequencies.tolist()), float(factor))


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; supported are: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse(config: Config, *features: str) -> None:
    for feature in features:
        if getattr(config, feature, None):
            raise ValueError(f"{config.model_type} with {feature}={getattr(config, feature)!r} is not supported")


_FAMILIES: dict[str, Callable[[Config], DecoderSpec]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _gemma4,
}
