"""The family table: a transformers config in, a `DecoderSpec` out.

transformers stays the source of configs. One function per family says what its config means. An architecture that is
not in the table is an error that lists those that are. Sizes and conventions were read from transformers 5.22's
modeling files, and tests/model/test_parity.py holds them to these files. A config often comes from a file, so every
value is read through `Values`, which refuses values that no model can have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specdec.kernels import BLOCK
from specdec.model.embedder.config import media_spec
from specdec.model.spec import Activation, DecoderSpec, ExpertsSpec, LayerSpec, RopeSpec
from specdec.weights.metadata import Values, finite, foreign, quote

LARGEST_HEAD = 1 << 16  # heads of a layer, and numbers in a head
MOST_EXPERTS = 1 << 12
# The least and the largest value that a config may have; values outside make sums that are not finite.
EPSILON, THETA, FACTOR, SOFTCAP = (0.0, 1.0), (1e-3, 1e30), (1e-6, 1e9), (1e-6, 1e9)

Config = Any  # a transformers PreTrainedConfig: its attributes differ from family to family

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


def decoder_spec(config: Config) -> DecoderSpec:
    """Return the spec of the decoder that `config` describes, with its embedder of media where it has one.

    Raises:
        ValueError: the architecture, or a feature of it (an unusual rope or activation), is not supported, or a value
            is none that a model has.
    """
    text = config.get_text_config(decoder=True)
    family = _FAMILIES.get(text.model_type)
    if family is None:
        raise ValueError(
            f"architecture {quote(text.model_type)} is not supported; supported are: {', '.join(sorted(_FAMILIES))}"
        )
    spec = family(text)
    media = media_spec(config, spec.hidden_size, spec.vocab_size)
    return spec if media is None else replace(spec, media=media, media_ids=media.tokens.ids)


def supported_families() -> tuple[str, ...]:
    """Return the `model_type` of every text config that `decoder_spec` accepts."""
    return tuple(sorted(_FAMILIES))


def _llama(config: Config) -> DecoderSpec:
    bias = Values(config).flag("attention_bias")
    return _plain(config, qkv_bias=bias, output_bias=bias, mlp_bias=Values(config).flag("mlp_bias"))


def _qwen2(config: Config) -> DecoderSpec:
    return _plain(config, qkv_bias=True)


def _qwen3(config: Config) -> DecoderSpec:
    bias = Values(config).flag("attention_bias")
    return _plain(config, qk_norm=True, qkv_bias=bias, output_bias=bias)


def _plain(config: Config, **features: Any) -> DecoderSpec:
    """Return the spec of Llama's shape, which Qwen shares: pre-norm, one rope, one head size."""
    values = Values(config)
    shared = values.whole("hidden_size") // values.whole("num_attention_heads", 1)
    head_dim = values.whole("head_dim", 0, LARGEST_HEAD, default=0) or shared
    layers = tuple(_layer(values, kind, head_dim) for kind in _kinds(values))
    activation = _activation(values.text("hidden_act"))
    return DecoderSpec(**_common(config, layers), attention_scale=head_dim**-0.5, activation=activation, **features)


def _gemma3(config: Config) -> DecoderSpec:
    _refuse(config, "use_bidirectional_attention", "attn_logit_softcapping")
    values = Values(config)
    head_dim = values.whole("head_dim", 1, LARGEST_HEAD)
    layers = tuple(_layer(values, kind, head_dim) for kind in _kinds(values))
    return DecoderSpec(
        **_common(config, layers),
        attention_scale=values.number("query_pre_attn_scalar", *FACTOR) ** -0.5,
        activation=_activation(values.text("hidden_activation")),
        embed_scale=math.sqrt(config.hidden_size),
        norm_offset=1.0,
        sandwich_norms=True,
        qk_norm=True,
        qkv_bias=values.flag("attention_bias"),
        output_bias=values.flag("attention_bias"),
        final_softcap=_softcap(values),
    )


def _gemma4(config: Config) -> DecoderSpec:
    if getattr(config, "use_bidirectional_attention", None) == "all":
        raise ValueError("use_bidirectional_attention='all' makes an encoder of this model; it cannot generate text")
    layers = gemma4_layers(config)
    values = Values(config)
    width = values.whole("hidden_size_per_layer_input", default=0)
    return DecoderSpec(
        **_common(config, layers),
        attention_scale=1.0,
        activation=_activation(values.text("hidden_activation")),
        embed_scale=math.sqrt(config.hidden_size),
        sandwich_norms=True,
        qk_norm=True,
        v_norm=True,
        qkv_bias=values.flag("attention_bias"),
        output_bias=values.flag("attention_bias"),
        layer_scalar=True,
        final_softcap=_softcap(values),
        per_layer_input=width,
        per_layer_vocab=values.whole("vocab_size_per_layer_input", 1) if width else 0,
        experts=_experts(values) if values.flag("enable_moe_block", default=False) else None,
    )


def _experts(values: Values) -> ExpertsSpec:
    """Return the experts beside each layer's MLP. Raises ValueError for widths that blocks of weights do not fit."""
    count, width = values.whole("num_experts", 1, MOST_EXPERTS), values.whole("moe_intermediate_size", 1)
    for name, size in (("moe_intermediate_size", width), ("hidden_size", values.whole("hidden_size", 1))):
        if size % BLOCK:
            raise ValueError(f"experts with a {name} of {size} are not supported, multiples of {BLOCK} are")
    return ExpertsSpec(count, values.whole("top_k_experts", 1, count), width)


def gemma4_layers(config: Config) -> tuple[LayerSpec, ...]:
    """Return the layers of a Gemma 4 text config: two head sizes, K=V full layers, shared K/V, wide shared MLPs."""
    values = Values(config)
    kinds = _kinds(values)
    own_kv = len(kinds) - values.whole("num_kv_shared_layers", 0, len(kinds), default=0)
    source = {kind: i for i, kind in enumerate(kinds[:own_kv])}
    # Layers that all share are an assistant's, which reads its backbone's K/V; else each kind has a layer to read.
    if own_kv and (lost := {*kinds} - {*source}):
        raise ValueError(f"num_kv_shared_layers leaves no layer with K/V of its own for {', '.join(sorted(lost))}")
    wide_shared = values.flag("use_double_wide_mlp", default=False)
    values_from_keys = values.flag("attention_k_eq_v")
    layers = []
    for i, kind in enumerate(kinds):
        shares = i >= own_kv
        own = Values(_of_layer(config, i, kind))
        layer = _layer(values, kind, own.whole("head_dim", 1, LARGEST_HEAD), own.whole("num_key_value_heads", 1))
        wide = shares and own_kv > 0 and wide_shared
        layers.append(
            replace(
                layer,
                intermediate_size=layer.intermediate_size * (2 if wide else 1),
                values_from_keys=values_from_keys and kind == "full_attention",
                kv_layer=source.get(kind) if shares else None,
            )
        )
    return tuple(layers)


def _of_layer(config: Config, index: int, kind: str) -> dict[str, Any]:
    """Return the sizes that full layers may override: `per_layer_config` since transformers 5.21, `global_*` before
    it."""
    names = ("head_dim", "num_key_value_heads")
    if hasattr(config, "per_layer_config"):
        with foreign("per_layer_config of the config"):
            own = config.per_layer_config[index]
            return {name: getattr(own, name) for name in names}
    sizes = {name: getattr(config, name) for name in names}
    if kind == "full_attention":
        sizes["head_dim"] = getattr(config, "global_head_dim", None) or sizes["head_dim"]
        if config.attention_k_eq_v:
            heads = getattr(config, "num_global_key_value_heads", None)
            sizes["num_key_value_heads"] = heads or sizes["num_key_value_heads"]
    return sizes


def _kinds(values: Values) -> list[str]:
    """Return the kind of every layer, which some configs list."""
    count = values.whole("num_hidden_layers", 1)
    if not values.has("layer_types"):
        return ["full_attention"] * count
    kinds = values.texts("layer_types", count)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layers of kind {quote(kind)} are not supported; full and sliding attention are")
    return kinds


def _layer(values: Values, kind: str, head_dim: int, kv_heads: int | None = None) -> LayerSpec:
    heads = values.whole("num_attention_heads", 1, LARGEST_HEAD)
    kv_heads = kv_heads or values.whole("num_key_value_heads", 1, default=heads)
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} K/V heads evenly; fetch it again")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"a head size of {head_dim}: rotary embeddings turn pairs; fetch it again")
    window = None
    if kind == "sliding_attention":
        window = values.whole("sliding_window", 1)
        # A window that no text outgrows is full attention, whose cache grows with the text.
        window = window if window < values.whole("max_position_embeddings", 1) else None
    return LayerSpec(kind, heads, kv_heads, head_dim, values.whole("intermediate_size", 1), window)


def _softcap(values: Values) -> float | None:
    name = "final_logit_softcapping"
    return values.number(name, *SOFTCAP) if values.has(name) else None


def _common(config: Config, layers: tuple[LayerSpec, ...]) -> dict[str, Any]:
    values = Values(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("the config says is_encoder_decoder; only decoders are supported")
    sizes = {layer.kind: layer.head_dim for layer in layers}
    if any(layer.head_dim != sizes[layer.kind] for layer in layers):
        raise ValueError("layers of one kind have heads of several sizes, which is not supported")
    return {
        "model_type": config.model_type,
        "vocab_size": values.whole("vocab_size", 1),
        "hidden_size": values.whole("hidden_size", 1),
        "layers": layers,
        "ropes": {kind: rope_spec(config, kind, head_dim) for kind, head_dim in sizes.items()},
        "norm_eps": values.number("rms_norm_eps", *EPSILON),
        "max_positions": values.whole("max_position_embeddings", 1),
        "tied_head": values.flag("tie_word_embeddings"),
    }


def rope_spec(config: Config, kind: str, head_dim: int) -> RopeSpec:
    """Return the frequencies of `kind`, for `head_dim` dimensions, in float32 as transformers computes them.

    Raises ValueError for a rope that is not supported, and for parameters whose frequencies are not finite.
    """
    values = Values(config).inner("rope_parameters")
    nested = values.has(kind)
    if nested:
        values = values.inner(kind)
    rope_type = values.text("rope_type", default="default")
    dims = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim  # [D / 2]
    theta, factor = values.number("rope_theta", *THETA), 1.0
    if rope_type in ("default", "linear"):
        frequencies = 1.0 / (theta**dims)
        if rope_type == "linear":
            frequencies = frequencies / values.number("factor", *FACTOR)
    elif rope_type == "proportional":
        rotated = int(values.number("partial_rotary_factor", 0, 1, default=1.0) * head_dim // 2)
        frequencies = 1.0 / (theta**dims) / values.number("factor", *FACTOR, default=1.0)
        frequencies[rotated:] = 0.0
    elif rope_type in ("llama3", "yarn") and not nested:
        with foreign("rope_parameters of the config"):
            frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    else:
        raise ValueError(
            f"rope type {quote(rope_type)} is not supported; supported are: default, linear, proportional, llama3, yarn"
        )
    if frequencies.shape != dims.shape or not finite((factor, *frequencies.tolist())):
        raise ValueError(f"the rope of {kind} has parameters that no model has; fetch it again")
    return RopeSpec(tuple(frequencies.tolist()), float(factor))


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {quote(name)} is not supported; supported are: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse(config: Config, *features: str) -> None:
    for feature in features:
        if getattr(config, feature, None):
            raise ValueError(f"{config.model_type} with {feature}={quote(getattr(config, feature))} is not supported")


_FAMILIES: dict[str, Callable[[Config], DecoderSpec]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _gemma4,
}
