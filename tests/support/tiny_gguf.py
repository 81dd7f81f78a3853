"""Tiny tokenizers in GGUF files without tensors: GPT-2's kind and Llama 2's, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from tokenizers.pre_tokenizers import ByteLevel

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
