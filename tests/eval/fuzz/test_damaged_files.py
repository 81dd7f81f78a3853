"""Files that say what cannot be: refused in a sentence that names the file, in a second, without work for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import specdec
from drafter import load_drafter
from drafter.data.dataset import Dataset, frequent, read_shard, size
from eval.fuzz.cases import VOCAB, World
from eval.fuzz.damage_gguf import read_gguf, write_gguf
from eval.fuzz.seeds import write_seeds
from specdec.weights.hf_config import GENERATION
from specdec.weights.packed import PackedFile
from specdec.weights.safetensors import INDEX

TERMINAL = "\x1b]0;owned\x07\x1b[2Jx"
SECONDS = 5.0  # of processor time; a second is what it takes, and many times less


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        write_seeds(folder)
        yield folder


@contextmanager
def refused(folder: Path, match: str | None = None) -> Iterator[None]:
    began = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        yield
    assert time.process_time() - began < SECONDS
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


def copied(seeds: Path, name: str, folder: Path) -> Path:
    return Path(shutil.copytree(seeds / name, folder / name))


def load(path: Path) -> Any:
    model = specdec.load(path, drafter=None, device="cpu")
    ids = torch.tensor([[5, 6, 7]], dtype=torch.int64)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


# GGUF


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


# Folders


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


# What this project writes itself


def repacked(path: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Change the index of a packed file, with a hash that is right; returns what the file was made from."""
    data = path.read_bytes()
    length = int.from_bytes(data[-48:-40], "little")
    index = json.loads(data[-48 - length : -48])
    change(index["tensors"])
    made = json.dumps(index).encode()
    footer = len(made).to_bytes(8, "little") + hashlib.sha256(made).digest() + data[-8:]
    path.write_bytes(data[: -48 - length] + made + footer)
    return {name: value for name, value in index["about"].items() if name != "byte_order"}


def part_of(tensors: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = list(tensors.values())[number]["parts"][0]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: part_of(tensors).update(at=1 << 50),
        lambda tensors: part_of(tensors).update(at=-64),
        lambda tensors: part_of(tensors).update(at=part_of(tensors, 1)["at"]),
        lambda tensors: part_of(tensors).update(at=part_of(tensors)["at"] + 1),
        lambda tensors: part_of(tensors).update(shape=[1 << 30, 1 << 30]),
        lambda tensors: part_of(tensors).update(shape=[-1, 4]),
        lambda tensors: part_of(tensors).update(dtype="float8"),
        lambda tensors: part_of(tensors).update(crc="0"),
        lambda tensors: next(iter(tensors.values())).update(parts=[]),
        lambda tensors: next(iter(tensors.values())).update(bits="4"),
        lambda tensors: tensors.update(extra=3),
    ],
)
def test_packed_files(seeds: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = copied(seeds, "packed", tmp_path) / "model.packed"
    about = repacked(path, change)
    with refused(path, "delete it, and it is made again"):
        PackedFile(path, about)


def test_packed_blocks_are_those_of_their_matrix(seeds: Path, tmp_path: Path) -> None:
    path = copied(seeds, "packed", tmp_path) / "model.packed"
    about = repacked(
        path, lambda tensors: [entry.update(rows=1 << 20) for entry in tensors.values() if "bits" in entry]
    )
    file = PackedFile(path, about)
    with refused(path):
        file.weight("layers.0.mlp.up_proj.weight")


def resaved(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(lengths=-t["lengths"]),
        lambda t: t.update(lengths=t["lengths"] + (1 << 40)),
        lambda t: t.update(lengths=t["lengths"].float()),
        lambda t: t.update(lengths=torch.tensor(3, dtype=torch.int64)),
        lambda t: t.update(answers=t["answers"] - 100),
        lambda t: t.update(answers=t["answers"][:1]),
        lambda t: t.update(tokens=t["tokens"].fill_(VOCAB)),
        lambda t: t.update(best=t["best"].fill_((1 << 31) - 1)),
        lambda t: t.update(best=t["best"].fill_(-1)),
        lambda t: t.update(best=t["best"].float()),
        lambda t: t.update(hidden=t["hidden"].flatten()),
        lambda t: t.update(hidden=t["hidden"].int()),
        lambda t: t.update({"1.k": t["1.k"][:, :3]}),
        lambda t: t.update({"1.v": t["1.v"][..., :3]}),
        lambda t: t.update({f"{TERMINAL}.k": t["1.k"].clone()}),
        lambda t: t.update({"x.out": t["hidden"].clone()}),
        lambda t: t.update(seconds=torch.tensor(float("nan"), dtype=torch.float64)),
        lambda t: t.pop("seconds"),
        lambda t: t.pop("1.v"),
    ],
)
def test_training_shards(seeds: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    folder = copied(seeds, "shards", tmp_path)
    resaved(folder / "00000.safetensors", change)
    with refused(folder / "00000.safetensors", "a damaged shard"):
        size([folder / "00000.safetensors"])
        frequent(Dataset(folder), VOCAB, 8)
        read_shard(folder / "00000.safetensors")


@pytest.mark.parametrize("text", ["", "[1]", "3", '"x"', '{"a": '])
def test_training_sets(seeds: Path, tmp_path: Path, text: str) -> None:
    folder = copied(seeds, "shards", tmp_path)
    (folder / "set.json").write_text(text)
    with refused(folder, "no training set here"):
        Dataset(folder)


def test_conversations_hold_what_the_model_has(seeds: Path, tmp_path: Path) -> None:
    """Bytes and checksums are right in each; shapes, lengths and marks are not."""
    path = copied(seeds, "conversation", tmp_path) / "saved.safetensors"
    whole, model = path.read_bytes(), World(seeds).model("hf-gemma4")
    model.conversations.limit = 1 << 26
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    about = json.loads(header["__metadata__"]["about"])
    stores = [name for name in header if name.startswith("store.")]

    def saved(**changes: Any) -> dict[str, Any]:
        return {"__metadata__": {**header["__metadata__"], "about": json.dumps({**about, **changes})}}

    def reshaped(name: str, shape: list[int]) -> dict[str, Any]:
        return {name: {**header[name], "shape": shape}}

    first = header[stores[0]]["shape"]
    count = header["tokens"]["shape"][0]
    for change in (
        reshaped(stores[0], [1, *first]),
        reshaped(stores[0], first[::-1]),
        reshaped("tokens", [count, 1]),
        {"tokens": {**header["tokens"], "dtype": "F64"}},
        saved(reach=-1),
        saved(reach="far"),
        saved(marks=[[count + 1, count + 1, 1]]),
        saved(marks=[[1, 1, 7]]),
        saved(marks=[[1, 1]]),
        saved(marks={"a": 1}),
        saved(checksums=[]),
        saved(notes=7),
        saved(identity=TERMINAL),
    ):
        made = json.dumps({**header, **change}).encode()
        path.write_bytes(len(made).to_bytes(8, "little") + made + whole[8 + length :])
        with refused(path):
            model.load_conversation(path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("head", {"reads": 3}),
        ("head", {"reads": []}),
        ("head", {"reads": [10**9]}),
        ("head", {"reads": [1.5]}),
        ("head", {"heads": 0}),
        ("head", {"hidden_size": "32"}),
        ("head", {"draft_vocab": [64]}),
        ("head", {"aux_layers": [-1]}),
        ("head", {"backbone": TERMINAL}),
        ("head", {"backbone": {"fingerprint": TERMINAL, "name": TERMINAL}}),
        ("head", {"weights": 7}),
        ("head", {"model_type": []}),
        ("assistant", {"backbone_hidden_size": "64"}),
        ("assistant", {"num_centroids": 0, "use_ordered_embeddings": True}),
        ("assistant", {"text_config": []}),
        ("assistant", {"model_type": TERMINAL}),
    ],
)
def test_drafters(seeds: Path, tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    folder = copied(seeds, name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with refused(folder):
        load_drafter(folder).bind(World(seeds).model("hf-llama" if name == "head" else "hf-gemma4").decoder)
