"""GGUF files that say what cannot be: refused in a sentence that names the file, without work for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import specdec
from eval.fuzz.cases import VOCAB
from eval.fuzz.damage_gguf import read_gguf, write_gguf
from tests.support.damaged import TERMINAL, copied, load, refused


def with_fields(seeds: Path, name: str, folder: Path, **changes: Any) -> Path:
    """The file of `name` with other values; a key that ends as the argument's name (`__` for a dot) says is changed."""
    path = copied(seeds, name, folder) / "model.gguf"
    data = path.read_bytes()
    version, fields, tensors, end = read_gguf(data)
    for key, value in changes.items():
        ending = key.replace("__", ".")
        found = [field for field in fields if field[0].endswith(ending)]
        assert len(found) == 1, (ending, [field[0] for field in fields])
        found[0][1:] = [None, value]
    path.write_bytes(write_gguf(version, fields, tensors, data[end:]))
    return path


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gguf-llama", "head_count_kv", 0),
        ("gguf-llama", "head_count_kv", [2, 2]),
        ("gguf-llama", "head_count_kv", 3),
        ("gguf-llama", "attention__head_count", 0),
        ("gguf-llama", "attention__head_count", 1 << 20),
        ("gguf-llama", "block_count", 1_000_000),
        ("gguf-llama", "block_count", 0),
        ("gguf-llama", "block_count", "two"),
        ("gguf-llama", "context_length", 0),
        ("gguf-llama", "embedding_length", -32),
        ("gguf-llama", "embedding_length", [32]),
        ("gguf-llama", "key_length", 7),
        ("gguf-llama", "key_length", 1 << 53),
        ("gguf-llama", "layer_norm_rms_epsilon", float("nan")),
        ("gguf-llama", "layer_norm_rms_epsilon", "1e-5"),
        ("gguf-llama", "freq_base", 0.0),
        ("gguf-llama", "eos_token_id", [1, 2]),
        ("gguf-llama", "bos_token_id", "bos"),
        ("gguf-gemma3", "sliding_window", 0),
        ("gguf-gemma3", "sliding_window_pattern", 0),
        ("gguf-gemma3", "sliding_window_pattern", [True]),
        ("gguf-gemma4-shared", "shared_kv_layers", 4),
        ("gguf-gemma4-shared", "shared_kv_layers", 3),
        ("gguf-gemma4-shared", "feed_forward_length", [64]),
        ("gguf-gemma4-shared", "sliding_window_pattern", [True] * 4),
        ("gguf-gemma4-shared", "final_logit_softcapping", 0.0),
        ("gguf-gemma4-shared", "embedding_length_per_layer_input", 63),
    ],
)
def test_gguf_metadata(seeds: Path, tmp_path: Path, name: str, key: str, value: Any) -> None:
    path = with_fields(seeds, name, tmp_path, **{key: value})
    with refused(path):
        load(path)


def test_whole_numbers_stand_for_floats_in_gguf(seeds: Path, tmp_path: Path) -> None:
    load(with_fields(seeds, "gguf-llama", tmp_path, layer_norm_rms_epsilon=1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ggml__tokens", [1] * VOCAB),
        ("ggml__tokens", "abc"),
        ("token_type", [1]),
        ("token_type", ["a"] * VOCAB),
        ("ggml__scores", ["a"] * VOCAB),
        ("ggml__scores", [float("nan")] * VOCAB),
        ("ggml__model", 3),
        ("unknown_token_id", [3]),
    ],
)
def test_gguf_tokenizers(seeds: Path, tmp_path: Path, key: str, value: Any) -> None:
    path = with_fields(seeds, "gguf-gemma3", tmp_path, **{key: value})
    with refused(path):
        specdec.load_tokenizer(path)


@pytest.mark.parametrize("length", [2_000, 200_000])
def test_a_piece_of_a_vocabulary_is_not_as_long_as_a_book(seeds: Path, tmp_path: Path, length: int) -> None:
    tokens = [f"<unused{i}>" for i in range(VOCAB)]
    tokens[270], tokens[271] = "a" * length, "b" * (length // 2)
    path = with_fields(seeds, "gguf-gemma3", tmp_path, ggml__tokens=tokens)
    with refused(path, f"a token of {length} characters"):
        specdec.load_tokenizer(path)


@pytest.mark.parametrize(("at", "value"), [(0, TERMINAL), (1, [1 << 40, 1 << 40]), (2, 31), (3, 1 << 40), (3, 7)])
def test_gguf_tensors(seeds: Path, tmp_path: Path, at: int, value: Any) -> None:
    path = copied(seeds, "gguf-llama", tmp_path) / "model.gguf"
    data = path.read_bytes()
    version, fields, tensors, end = read_gguf(data)
    tensors[3][at] = value
    path.write_bytes(write_gguf(version, fields, tensors, data[end:]))
    with refused(path):
        load(path)


@pytest.mark.parametrize("alignment", [0, 3])
def test_gguf_alignment(seeds: Path, tmp_path: Path, alignment: int) -> None:
    path = copied(seeds, "gguf-llama", tmp_path) / "model.gguf"
    data = path.read_bytes()
    version, fields, tensors, end = read_gguf(data)
    path.write_bytes(write_gguf(version, [*fields, ["general.alignment", 4, alignment]], tensors, data[end:]))
    with refused(path):
        load(path)
