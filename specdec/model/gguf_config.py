"""From GGUF metadata to a transformers config, so that one table of families serves both formats.

Keys are those of gguf-py's constants; what each architecture writes was read from llama.cpp's converter. A file's
`rope_freqs.weight` holds divisors of the full layers' rope frequencies (Llama 3's scaling, and Gemma 4's dimensions
that do not rotate, as 1e30).
"""

from __future__ import annotations

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

from specdec.model.spec import DecoderSpec, RopeSpec

_NOT_ROTATED = 1e29  # a divisor from which on a dimension counts as not rotating
_GEMMA3_LAYERS_OF_27B = 62


class Keys:
    """Metadata of one file; `keys["attention.head_count"]` reads `llama.attention.head_count`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.architecture = str(metadata.get("general.architecture", ""))

    def __getitem__(self, key: str) -> Any:
        name = f"{self.architecture}.{key}"
        if name not in self.metadata:
            raise ValueError(f"the GGUF file has no {name!r}, which a {self.architecture} model needs")
        return self.metadata[name]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    """The transformers config of a GGUF file with this metadata and these tensor shapes (torch order).

    Raises:
        ValueError: the architecture is not supported, or a key that it needs is missing.
    """
    keys = Keys(metadata)
    make = _ARCHITECTURES.get(keys.architecture)
    if make is None:
        raise ValueError(
            f"GGUF architecture {keys.architecture!r} is not supported; supported are: "
            f"{', '.join(sorted(_ARCHITECTURES))}"
        )
    if "token_embd.weight" not in shapes:
        raise ValueError("the GGUF file has no token_embd.weight: it is a part of a model, or an adapter")
    common = {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": keys["block_count"],
        "num_attention_heads": keys["attention.head_count"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": keys["context_length"],
        "tie_word_embeddings": "output.weight" not in shapes,
        **{
            name: metadata[f"tokenizer.ggml.{key}"]
            for name, key in (
                ("bos_token_id", "bos_token_id"),
                ("eos_token_id", "eos_token_id"),
                ("pad_token_id", "padding_token_id"),
            )
            if f"tokenizer.ggml.{key}" in metadata
        },
    }
    return make(keys, common, shapes)


def with_rope_divisors(spec: DecoderSpec, divisors: Tensor) -> DecoderSpec:
    """`spec` with the frequencies of its full layers divided by a file's `rope_freqs.weight` [head_dim / 2]."""
    rope = spec.ropes["full_attention"]
    if len(divisors) != len(rope.frequencies):
        raise ValueError(f"rope_freqs.weight has {len(divisors)} values, the head size needs {len(rope.frequencies)}")
    frequencies = tuple(
        0.0 if d >= _NOT_ROTATED else f / d for f, d in zip(rope.frequencies, divisors.tolist(), strict=True)
    )
    return replace(spec, ropes={**spec.ropes, "full_attention": RopeSpec(frequencies, rope.factor)})


def _rope(keys: Keys, default_theta: float) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", default_theta)}
    scaling = keys.get("rope.scaling.type", "none")
    if scaling == "linear" or (scaling == "none" and keys.get("rope.scaling.factor")):
        rope.update(rope_type="linear", factor=keys["rope.scaling.factor"])
    elif scaling == "yarn":
        rope.update(
            rope_type="yarn",
            factor=keys["rope.scaling.factor"],
            original_max_position_embeddings=keys["rope.scaling.original_context_length"],
        )
    elif scaling != "none":
        raise ValueError(f"GGUF rope scaling {scaling!r} is not supported; supported are: none, linear, yarn")
    return rope


def _grouped(keys: Keys) -> dict[str, Any]:
    heads = keys["attention.head_count"]
    return {
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "intermediate_size": keys["feed_forward_length"],
    }


def _head_dim(keys: Keys) -> int:
    return int(keys.get("attention.key_length") or keys["embedding_length"] // keys["attention.head_count"])


def _llama(keys: Keys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    return LlamaConfig(
        **common,
        **_grouped(keys),
        head_dim=_head_dim(keys),
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        rope_parameters=_rope(keys, 10_000.0),
    )


def _qwen2(keys: Keys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    return Qwen2Config(**common, **_grouped(keys), rope_parameters=_rope(keys, 10_000.0))


def _qwen3(keys: Keys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    return Qwen3Config(**common, **_grouped(keys), head_dim=_head_dim(keys), rope_parameters=_rope(keys, 1_000_000.0))


def _gemma3(keys: Keys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    head_dim, layers = _head_dim(keys), keys["block_count"]
    # The file does not say the attention scale; llama.cpp knows the one size that differs by its layer count.
    scalar = common["hidden_size"] // common["num_attention_heads"] if layers == _GEMMA3_LAYERS_OF_27B else head_dim
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)}
    return Gemma3TextConfig(
        **common,
        **_grouped(keys),
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        sliding_window=keys["attention.sliding_window"],
        layer_types=_layer_types(keys, layers, default=6),
        rope_parameters={"full_attention": _rope(keys, 1_000_000.0), "sliding_attention": local},
        final_logit_softcapping=keys.get("final_logit_softcapping"),
        attn_logit_softcapping=None,
    )


def _gemma4(keys: Keys, common: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    if any(".ffn_gate_inp." in name for name in shapes):
        raise ValueError("mixture-of-experts Gemma 4 (26B-A4B) is not supported; use a dense one")
    layers = keys["block_count"]
    kinds = _layer_types(keys, layers, default=6)
    kv_heads = keys["attention.head_count_kv"]
    if not isinstance(kv_heads, list):
        kv_heads = [kv_heads] * layers
    widths = keys["feed_forward_length"]
    if not isinstance(widths, list):
        widths = [widths] * layers
    sliding, full = kinds.index("sliding_attention"), kinds.index("full_attention")
    per_layer = keys.get("embedding_length_per_layer_input", 0)
    return Gemma4TextConfig(
        **common,
        intermediate_size=widths[0],
        num_key_value_heads=kv_heads[sliding],
        num_global_key_value_heads=kv_heads[full],
        head_dim=keys.get("attention.key_length_swa", keys["attention.key_length"]),
        global_head_dim=keys["attention.key_length"],
        attention_k_eq_v=f"blk.{full}.attn_v.weight" not in shapes,
        sliding_window=keys["attention.sliding_window"],
        layer_types=kinds,
        num_kv_shared_layers=keys.get("attention.shared_kv_layers", 0),
        use_double_wide_mlp=widths[-1] == 2 * widths[0],
        hidden_size_per_layer_input=per_layer,
        vocab_size_per_layer_input=shapes["per_layer_token_embd.weight"][0] if per_layer else common["vocab_size"],
        final_logit_softcapping=keys.get("final_logit_softcapping"),
        rope_parameters={  # which dimensions of full layers rotate is in rope_freqs.weight
            "full_attention": {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 1_000_000.0)},
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)},
        },
    )


def _layer_types(keys: Keys, layers: int, default: int) -> list[str]:
    """Every n-th layer is full, or a list says which are sliding."""
    pattern = keys.get("attention.sliding_window_pattern", default)
    if isinstance(pattern, list):
        return ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]


_ARCHITECTURES: dict[str, Callable[[Keys, dict[str, Any], Mapping[str, tuple[int, ...]]], PretrainedConfig]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}
