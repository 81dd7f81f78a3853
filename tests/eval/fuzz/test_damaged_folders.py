"""Folders in the Hugging Face format that say what cannot be: refused in a sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import specdec
from specdec.weights.hf_config import GENERATION
from specdec.weights.safetensors import INDEX
from tests.support.damaged import TERMINAL, copied, load, refused


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hf-llama", {"model_type": {}}),
        ("hf-llama", {"model_type": TERMINAL}),
        ("hf-llama", {"architectures": 7, "num_key_value_heads": 0}),
        ("hf-llama", {"num_hidden_layers": 1_000_000}),
        ("hf-llama", {"num_hidden_layers": 1e9}),
        ("hf-llama", {"num_labels": 10**9}),
        ("hf-llama", {"num_labels": 65536}),
        ("hf-llama", {"id2label": 3}),
        ("hf-llama", {TERMINAL: 3}),
        ("hf-llama", {"rope_parameters": {"rope_type": TERMINAL, "rope_theta": 1e4}}),
        ("hf-llama", {"head_dim": 1 << 53}),
        ("hf-llama", {"head_dim": 7}),
        ("hf-llama", {"vocab_size": 10**30}),
        ("hf-llama", {"rms_norm_eps": -1}),
        ("hf-llama", {"attention_bias": 2}),
        ("hf-llama", {"is_encoder_decoder": True}),
        ("hf-llama", {"rope_parameters": 5}),
        ("hf-llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "none"}}),
        ("hf-llama", {"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 1e4}}),
        ("hf-qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0}}),
        ("hf-qwen3", {"layer_types": ["full_attention", 16777216]}),
        ("hf-qwen3", {"layer_types": ["full_attention"]}),
        ("hf-qwen3", {"num_key_value_heads": 0}),
        ("hf-gemma3", {"num_attention_heads": 0}),
        ("hf-gemma3", {"query_pre_attn_scalar": -1}),
        ("hf-gemma3", {"sliding_window": 0}),
        ("hf-gemma3", {"hidden_activation": None}),
        ("hf-gemma4-shared", {"per_layer_config": 3}),
        ("hf-gemma4-shared", {"num_kv_shared_layers": 9}),
        ("hf-gemma4-shared", {"hidden_size_per_layer_input": 63}),
        ("hf-gemma4", {"text_config": 0.5}),
    ],
)
def test_configs(seeds: Path, tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    folder = copied(seeds, name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with refused(folder):
        load(folder)


@pytest.mark.parametrize("changes", [{"num_labels": 10**9}, {"num_hidden_layers": 10**9}])
def test_a_tokenizer_is_not_chosen_by_such_a_config(seeds: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = copied(seeds, "hf-llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with refused(folder):
        specdec.load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_names_in_a_tokenizers_settings_are_not_printed(
    seeds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    folder = copied(seeds, "hf-llama", tmp_path)
    values = json.loads((folder / name).read_text())
    if name == "tokenizer.json":
        values["added_tokens"][0][TERMINAL] = 1
    else:
        values["eos_token"] = {"content": "<eos>", "__type": "AddedToken", TERMINAL: 1}
    (folder / name).write_text(json.dumps(values))
    with refused(folder, name):
        specdec.load_tokenizer(folder)
    printed = capfd.readouterr()
    assert "\x1b" not in printed.out + printed.err


def test_a_window_that_no_text_outgrows_is_full_attention(seeds: Path, tmp_path: Path) -> None:
    folder = copied(seeds, "hf-gemma3", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 1 << 30}))
    model = specdec.load(folder, drafter=None, device="cpu")
    assert model.decoder.spec.windows == (None, None)
    assert model.decoder.new_cache().nbytes < 1 << 20


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token_id": "../../x"},
        {"eos_token_id": [1, "two"]},
        {"eos_token_id": []},
        {TERMINAL: 1},
        {"pad_token_id": float("inf")},
        {"temperature": "warm"},
        {"temperature": float("nan")},
        {"top_k": 0.5},
        {"max_new_tokens": -1},
        {"do_sample": 3},
        {"stop_strings": [1]},
        {"bad_words_ids": [[1, "a"]]},
        {"watermarking_config": 4},
        {"transformers_version": [1]},
        {"cache_implementation": TERMINAL},
    ],
)
def test_generation_configs(seeds: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = copied(seeds, "hf-llama", tmp_path)
    (folder / GENERATION).write_text(json.dumps(changes))
    with refused(folder, GENERATION):
        load(folder)


@pytest.mark.parametrize(
    "shard", ["../hf-llama/model.safetensors", "/etc/passwd", TERMINAL, "a" * 5000, "\ud800", "", "..", 7, None, []]
)
def test_an_index_names_files_beside_it(seeds: Path, tmp_path: Path, shard: Any) -> None:
    folder = copied(seeds, "sharded", tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with refused(folder, INDEX):
        load(folder)


def test_values_that_are_not_finite(seeds: Path, tmp_path: Path) -> None:
    folder = copied(seeds, "hf-llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with refused(folder, "model.norm.weight' holds values that are not finite"):
        load(folder)
