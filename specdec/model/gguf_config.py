"""From GGUF metadata to a transformers config, so that one table of families serves both formats.

Keys are those of gguf-py's constants; the keys of each architecture were read from llama.cpp's converter. A file's
`rope_freqs.weight` holds divisors of the full layers' rope frequencies (Llama 3's scaling, and Gemma 4's dimensions
that do not rotate, as 1e30).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from specdec.model.families import EPSILON, FACTOR, LARGEST_HEAD, MOST_EXPERTS, SOFTCAP, THETA
from specdec.model.spec import DecoderSpec, RopeSpec
from specdec.weights.metadata import LARGEST, Values, finite, foreign, quote

_NOT_ROTATED = 1e29  # a divisor from which on a dimension counts as not rotating
_GEMMA3_LAYERS_OF_27B = 62


class GGUFKeys(Values):
    """Hold the metadata of one file; `keys.whole("attention.head_count")` reads `llama.attention.head_count`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.architecture = Values(metadata).text("general.architecture", default="")
        super().__init__(metadata, f"{self.architecture}.")


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    """Return the transformers config of a GGUF file with this metadata and these tensor shapes (torch order).

    Raises:
        ValueError: the architecture is not supported, a key that it needs is missing, or a value cannot be one of a
            model with these tensors.
    """
    keys = GGUFKeys(metadata)
    make = _ARCHITECTURES.get(keys.architecture)
    if make is None:
        raise ValueError(
            f"GGUF architecture {quote(keys.architecture)} is not supported; supported are: "
            f"{', '.join(sorted(_ARCHITECTURES))}"
        )
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise ValueError("the GGUF file has no token_embd.weight: it is a part of a model, or an adapter")
    ids = Values(metadata, "tokenizer.ggml.")
    common = {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": keys.whole("embedding_length", 1),
        # A layer has tensors of its own, so a file's tensors bound what may be made for a forged number.
        "num_hidden_layers": keys.whole("block_count", 1, len(shapes)),
        "num_attention_heads": keys.whole("attention.head_count", 1, LARGEST_HEAD),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", *EPSILON),
        "max_position_embeddings": keys.whole("context_length", 1),
        "tie_word_embeddings": "output.weight" not in shapes,
        **{
            name: ids.whole(key, 0, 2 * LARGEST)
            for name, key in (
                ("bos_token_id", "bos_token_id"),
                ("eos_token_id", "eos_token_id"),
                ("pad_token_id", "padding_token_id"),
            )
            if ids.has(key)
        },
    }
    return make(keys, common, shapes)


def with_rope_divisors(spec: DecoderSpec, divisors: Tensor) -> DecoderSpec:
    """Return `spec` with the frequencies of its full layers divided by `rope_freqs.weight` [head_dim / 2]."""
    rope = spec.ropes.get("full_attention")
    if rope is None or divisors.shape != (len(rope.frequencies),):
        due = "no full layers" if rope is None else f"a head size that needs {len(rope.frequencies)}"
        raise ValueError(f"rope_freqs.weight has {divisors.numel()} values for {due}; fetch it again")
    values = divisors.tolist()
    frequencies = tuple(
        0.0 if d >= _NOT_ROTATED else f / d if d else math.inf for f, d in zip(rope.frequencies, values, strict=True)
    )
    if not finite(frequencies):
        raise ValueError("rope_freqs.weight holds values that are zero or not finite; fetch it again")
    return replace(spec, ropes={**spec.ropes, "full_attention": RopeSpec(frequencies, rope.factor)})


def _theta(keys: GGUFKeys, name: str, default: float) -> float:
    return keys.number(name, *THETA, default=default)


def _rope(keys: GGUFKeys, default_theta: float) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _theta(keys, "rope.freq_base", default_theta)}
    scaling = keys.text("rope.scaling.type", default="none")
    if scaling == "linear" or (scaling == "none" and keys.has("rope.scaling.factor")):
        rope.update(rope_type="linear", factor=keys.number("rope.scaling.factor", *FACTOR))
    elif scaling == "yarn":
        rope.update(
            rope_type="yarn",
            factor=keys.number("rope.scaling.factor", *FACTOR),
            original_max_position_embeddings=keys.whole("rope.scaling.original_context_length", 1),
        )
    elif scaling != "none":
        raise ValueError(f"GGUF rope scaling {quote(scaling)} is not supported; supported are: none, linear, yarn")
    return rope


def _grouped(keys: GGUFKeys) -> dict[str, Any]:
    return {
        "num_key_value_heads": keys.whole("attention.head_count_kv", 1, default=keys.whole("attention.head_count", 1)),
        "intermediate_size": keys.whole("feed_forward_length", 1),
    }


def _head_dim(keys: GGUFKeys) -> int:
    shared = keys.whole("embedding_length") // keys.whole("attention.head_count", 1)
    return keys.whole("attention.key_length", 0, LARGEST_HEAD, default=0) or shared


def _made(kind: type[PretrainedConfig], **values: Any) -> PretrainedConfig:
    """Return the config of these values, every one of which has been checked; transformers has checks of its own."""
    with foreign("the GGUF file's metadata"):
        return kind(**values)


def _llama(keys: GGUFKeys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    return _made(
        LlamaConfig,
        **common,
        **_grouped(keys),
        head_dim=_head_dim(keys),
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        rope_parameters=_rope(keys, 10_000.0),
    )


def _qwen2(keys: GGUFKeys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    return _made(Qwen2Config, **common, **_grouped(keys), rope_parameters=_rope(keys, 10_000.0))


def _qwen3(keys: GGUFKeys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    rope = _rope(keys, 1_000_000.0)
    return _made(Qwen3Config, **common, **_grouped(keys), head_dim=_head_dim(keys), rope_parameters=rope)


def _gemma3(keys: GGUFKeys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    head_dim, layers = _head_dim(keys), common["num_hidden_layers"]
    # The file does not say the attention scale; llama.cpp knows the one size that differs by its layer count.
    scalar = common["hidden_size"] // common["num_attention_heads"] if layers == _GEMMA3_LAYERS_OF_27B else head_dim
    local = {"rope_type": "default", "rope_theta": _theta(keys, "rope.freq_base_swa", 10_000.0)}
    return _made(
        Gemma3TextConfig,
        **common,
        **_grouped(keys),
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        sliding_window=keys.whole("attention.sliding_window", 1),
        layer_types=_layer_types(keys, layers, default=6),
        rope_parameters={"full_attention": _rope(keys, 1_000_000.0), "sliding_attention": local},
        final_logit_softcapping=_softcap(keys),
        attn_logit_softcapping=None,
    )


def _gemma4(keys: GGUFKeys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    layers = common["num_hidden_layers"]
    sizes = gemma4_layers(keys, layers)
    kinds, widths = sizes["layer_types"], _each(keys, "feed_forward_length", layers)
    if len(set(kinds)) < 2:
        raise ValueError(f"all layers of the GGUF file are {kinds[0]}; Gemma 4 has both kinds")
    per_layer = keys.whole("embedding_length_per_layer_input", default=0)
    table = shapes.get("per_layer_token_embd.weight", ())
    if per_layer and len(table) != 2:
        raise ValueError("the GGUF file has no per_layer_token_embd.weight, which its embedding_length_per_layer needs")
    return _made(
        Gemma4TextConfig,
        **common,
        **sizes,
        **(_gemma4_experts(keys) if any(".ffn_gate_inp." in name for name in shapes) else {}),
        attention_k_eq_v=f"blk.{kinds.index('full_attention')}.attn_v.weight" not in shapes,
        num_kv_shared_layers=keys.whole("attention.shared_kv_layers", 0, layers - 1, default=0),
        use_double_wide_mlp=widths[-1] == 2 * widths[0],
        hidden_size_per_layer_input=per_layer,
        vocab_size_per_layer_input=table[0] if per_layer else common["vocab_size"],
        final_logit_softcapping=_softcap(keys),
    )


def _gemma4_experts(keys: GGUFKeys) -> dict[str, Any]:
    """Return the sizes of the mixture of 26B-A4B, as arguments of `Gemma4TextConfig`."""
    return {
        "enable_moe_block": True,
        "num_experts": keys.whole("expert_count", 1, MOST_EXPERTS),
        "top_k_experts": keys.whole("expert_used_count", 1, MOST_EXPERTS),
        "moe_intermediate_size": keys.whole("expert_feed_forward_length", 1),
    }


def gemma4_layers(keys: GGUFKeys, layers: int) -> dict[str, Any]:
    """Return the sizes of the layers of a Gemma 4 model, or of its assistant, as arguments of `Gemma4TextConfig`.

    Which dimensions of full layers rotate is in `rope_freqs.weight`.
    """
    kinds = _layer_types(keys, layers, default=6)
    kv_heads = dict(zip(kinds, _each(keys, "attention.head_count_kv", layers), strict=True))
    any_heads = next(iter(kv_heads.values()))
    key_length = keys.whole("attention.key_length", 1, LARGEST_HEAD)
    return {
        "intermediate_size": _each(keys, "feed_forward_length", layers)[0],
        "num_key_value_heads": kv_heads.get("sliding_attention", any_heads),
        "num_global_key_value_heads": kv_heads.get("full_attention", any_heads),
        "head_dim": keys.whole("attention.key_length_swa", 1, LARGEST_HEAD, default=key_length),
        "global_head_dim": key_length,
        "sliding_window": keys.whole("attention.sliding_window", 1),
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": _theta(keys, "rope.freq_base", 1_000_000.0)},
            "sliding_attention": {"rope_type": "default", "rope_theta": _theta(keys, "rope.freq_base_swa", 10_000.0)},
        },
    }


def _softcap(keys: GGUFKeys) -> float | None:
    name = "final_logit_softcapping"
    return keys.number(name, *SOFTCAP) if keys.has(name) else None


def _each(keys: GGUFKeys, name: str, layers: int) -> list[int]:
    """Return one number for each layer, which the file lists, or gives once for all."""
    if isinstance(keys.find(name), list):
        return keys.wholes(name, 1, length=layers)
    return [keys.whole(name, 1)] * layers


def _layer_types(keys: GGUFKeys, layers: int, default: int) -> list[str]:
    """Return the kind of each layer: every n-th layer is full, or a list says which layers are sliding."""
    name = "attention.sliding_window_pattern"
    if isinstance(keys.find(name), list):
        slide = [bool(slides) for slides in keys.sequence(name, layers)]
    else:
        pattern = keys.whole(name, 1, default=default)
        slide = [bool((i + 1) % pattern) for i in range(layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in slide]


_ARCHITECTURES: dict[str, Callable[[GGUFKeys, dict[str, Any], Mapping[str, tuple[int, ...]]], PretrainedConfig]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}


def gguf_architecture(spec: DecoderSpec) -> str:
    """Return what GGUF files call the architecture of a model of `spec`."""
    return spec.model_type.split("_")[0]
