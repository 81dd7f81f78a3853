"""Tiny random models of every family, made on the spot by transformers' own classes in float32.

They prove parity and exactness, never speed or acceptance. Windows are 16 positions, so that short texts run past them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

WINDOW = 16
VOCAB = 256

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
_GEMMA4 = {
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": WINDOW,
    "layer_types": _KINDS * 2,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
}

# name -> (config class, model class, config arguments on top of SHAPE)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-bias-untied": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama3-rope": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-sliding": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3-yarn": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "num_hidden_layers": 3,
            "layer_types": _KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM", _GEMMA4),
    "gemma4-e2b": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "attention_k_eq_v": False,
            "num_global_key_value_heads": None,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    # E4B's pattern, five sliding layers to a full one, whose last periods read the K/V of the last layers before them.
    # With 18 layers transformers' float32 is 1.4e-4 from its float64, with 12 it is 5e-5.
    "gemma4-e4b": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "num_hidden_layers": 12,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
            "attention_k_eq_v": False,
            "num_global_key_value_heads": None,
            "num_kv_shared_layers": 6,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    "gemma4-moe": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {**_GEMMA4, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 32},
    ),
    "gemma4_unified": ("Gemma4UnifiedTextConfig", "Gemma4UnifiedForCausalLM", _GEMMA4),
}


# The same with widths that llama.cpp's blocks of 256 inputs divide; of a mixture those of 64.
WIDE_FAMILIES = {
    f"{family}-wide": (*FAMILIES[family][:2], {**FAMILIES[family][2], **shape})
    for family, shape in {
        "gemma3": {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64},
        "gemma4-moe": {"intermediate_size": 128, "moe_intermediate_size": 64},
    }.items()
}


@cache
def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random transformers model of `family`, in float32 and evaluation mode. Shared: do not change it."""
    config_class, model_class, arguments = (FAMILIES | WIDE_FAMILIES)[family]
    config = getattr(transformers, config_class)(**{**SHAPE, **arguments})
    config._attn_implementation = "eager"  # the plainest of transformers' arithmetic
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Initialised as published, norms are all ones and biases zero: a mistake in them would not show.
            parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.08) + float("norm" in name))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.9)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=2, eos_token_id=None)
    return model


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [1, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (1, length), generator=generator)
