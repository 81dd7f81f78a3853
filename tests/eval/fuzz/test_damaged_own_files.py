"""Files of our own that say what cannot be: packed weights, training sets, conversations, drafters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drafter import load_drafter
from drafter.data.dataset import Dataset, frequent, read_shard, size
from eval.fuzz.cases import VOCAB, World
from specdec.weights.packed import PackedFile
from tests.support.damaged import TERMINAL, copied, refused


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
