"""Tiny GGUF files: models without a tokenizer, and tokenizers without a model, of GPT-2's kind and Llama 2's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel

from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors, gguf_name
from tests.support.formats.gguf_blocks import blocks_of_a_model
from tests.support.tiny import WINDOW, tiny_model

ALPHABET = sorted(ByteLevel.alphabet())  # one letter for each of the 256 bytes
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file without tensors; keys are given without "tokenizer.ggml."."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.context_length", 77)
    for key, value in metadata.items():
        full = key if "." in key else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(path: Path, **extra: Any) -> Path:
    """GPT-2's kind: special tokens 0-2, the bytes, three merges, and "<think>" of the user-defined kind."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "he", "ll", "hell", "<think>", "12"]
    kinds = [3] * 3 + [1] * 259 + [4, 1]
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": kinds,
        "merges": ["h e", "l l", "he ll", "1 2"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        **extra,
    }
    return write(path, {key: value for key, value in metadata.items() if value is not None})


def sentencepiece(path: Path, **extra: Any) -> Path:
    """Llama 2's kind: unk, bos, eos, bytes, then pieces in the order of their scores."""
    pieces = ["▁a", "bc", "ab", "▁ab", "abc", "a", "b", "c", "▁", "  "]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(index) for index in range(len(pieces))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * 9 + [4],
        **extra,
    }
    return write(path, {key: value for key, value in metadata.items() if value is not None})


def gemma4_tokens(path: Path, **extra: Any) -> Path:
    """Gemma 4's kind: merges over characters that are listed, in another order than the scores would put them."""
    pieces = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *pieces, "<|turn>"]
    metadata = {
        "model": "gemma4",
        "tokens": tokens,
        "scores": [float(i) for i in range(len(tokens))],  # Ollama's: the place in the list
        "token_type": [3, 3, 3, 3] + [6] * 256 + [1] * 8 + [4],
        "merges": ["▁ a", "a b", "b c", "a bc", "ab c"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "padding_token_id": 0,
        "unknown_token_id": 3,
        **extra,
    }
    return write(path, {key: value for key, value in metadata.items() if value is not None})


def write_model(
    path: Path,
    family: str,
    kind: GGMLQuantizationType,
    tokens: list[str] | None = None,
    extra: Mapping[str, tuple[np.ndarray, GGMLQuantizationType | None]] | None = None,
    ollama: bool = False,
    random: bool = False,
    model: PreTrainedModel | None = None,
) -> Path:
    """`tiny_model(family)` as llama.cpp's converter writes it: names, metadata, Llama's row order, Gemma 3's norms.

    `tokens`: texts of a vocabulary, without the rest of a tokenizer. `extra`: tensors besides, with their types.
    `ollama`: experts under the names of Ollama's converter. `random`: matrices are not the model's but random blocks,
    of types that the `gguf` package cannot write too. `model`: another one of the family."""
    model = model or tiny_model(family)
    config, spec = model.config, decoder_spec(model.config)
    known = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
    arch = known.get(spec.model_type, "gemma4")
    writer = GGUFWriter(path, arch)
    writer.add_vocab_size(config.vocab_size)
    if tokens is not None:
        writer.add_token_list(tokens)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(spec.layers))
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    sliding, full = spec.layers[0], spec.layers[-1]
    writer.add_key_length(full.head_dim)
    if arch == "gemma4":
        writer.add_feed_forward_length([layer.intermediate_size for layer in spec.layers])
        writer.add_head_count_kv([layer.kv_heads for layer in spec.layers])
        writer.add_key_length_swa(sliding.head_dim)
        writer.add_sliding_window(WINDOW)
        writer.add_sliding_window_pattern([layer.window is not None for layer in spec.layers])
        writer.add_shared_kv_layers(config.num_kv_shared_layers)
        writer.add_embedding_length_per_layer_input(spec.per_layer_input)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_rope_freq_base(1e6)
        rotated = full.head_dim // 8
        divisors = np.array([1.0] * rotated + [1e30] * (full.head_dim // 2 - rotated), dtype=np.float32)
        writer.add_tensor("rope_freqs.weight", divisors)
        if spec.experts is not None:
            writer.add_expert_count(spec.experts.count)
            writer.add_expert_used_count(spec.experts.used)
            writer.add_expert_feed_forward_length(spec.experts.width)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(1e6 if arch == "gemma3" else config.rope_parameters["rope_theta"])
    if arch == "gemma3":
        writer.add_sliding_window(WINDOW)
        writer.add_sliding_window_pattern(3)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    for name in expected_tensors(spec):
        tensor = state[name].float()
        if name.endswith("norm.weight"):
            tensor = tensor + spec.norm_offset
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            head = spec.layers[0].head_dim
            tensor = tensor.reshape(-1, 2, head // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        for stored_as, array in _stored(gguf_name(spec, name), tensor.contiguous().numpy(), ollama).items():
            if array.ndim >= 2 and random and "ffn_gate_inp" not in stored_as:
                rows, columns = int(np.prod(array.shape[:-1])), array.shape[-1]
                blocks = blocks_of_a_model(kind, rows, columns, rows + len(name), 0.08)
                writer.add_tensor(stored_as, blocks.reshape(*array.shape[:-1], -1), raw_dtype=kind)
                if kind is GGMLQuantizationType.NVFP4 and "ffn_down_exps" not in stored_as:  # which has its own
                    count = len(array) if array.ndim > 2 else 1
                    scale = np.linspace(0.06, 0.08, count, dtype=np.float32)
                    writer.add_tensor(stored_as.removesuffix("weight") + "scale", scale)
            elif array.ndim >= 2 and array.shape[-1] % 32 == 0 and "ffn_gate_inp" not in stored_as:
                writer.add_tensor(stored_as, quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(stored_as, array)
    for name, (array, stored) in (extra or {}).items():
        writer.add_tensor(name, array, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(name: str, array: np.ndarray, ollama: bool) -> dict[str, np.ndarray]:
    """The tensor `name`, or what Ollama's converter makes of it."""
    if ollama and "ffn_gate_up_exps" in name:
        gate, up = (np.ascontiguousarray(part) for part in np.split(array, 2, axis=1))
        return {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    return {name.replace("ffn_down_exps.scale", "ffn_gate_inp.per_expert_scale") if ollama else name: array}
