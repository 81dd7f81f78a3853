"""Safetensors checkpoints: single files and shards, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specdec.weights import BlockWeight, DenseWeight, SafetensorsCheckpoint, quantize

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def matrix(rows: int = 24, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    save_file({"a": matrix(seed=1), "norm": torch.ones(64)}, folder / FIRST)
    save_file({"b": matrix(seed=2).bfloat16()}, folder / SECOND)
    names = {"a": FIRST, "norm": FIRST, "b": SECOND} if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def refused(path: Path) -> str:
    """The message of the ValueError for `path`, which must name it and come in well under a second."""
    start = time.perf_counter()
    with pytest.raises(ValueError, match=path.name) as caught:
        SafetensorsCheckpoint(path)
    assert time.perf_counter() - start < 0.9
    return str(caught.value)


@pytest.mark.parametrize("by", ["file", "folder", "folder with another name inside"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_file(tmp_path, by, stored):
    w = matrix().to(stored)
    file = tmp_path / ("drafter.safetensors" if "another" in by else "model.safetensors")
    save_file({"w": w, "norm": w[0].clone(), "scalar": torch.tensor(2.5, dtype=stored)}, file)
    checkpoint = SafetensorsCheckpoint(file if by == "file" else tmp_path)
    assert checkpoint.path == (file if by == "file" else tmp_path)
    assert checkpoint.shapes() == {"w": (24, 64), "norm": (64,), "scalar": ()}
    assert torch.equal(checkpoint.tensor("w"), w.float())
    assert checkpoint.tensor("norm").dtype == torch.float32
    assert checkpoint.tensor("scalar").item() == 2.5
    for asked in (None, "none"):
        dense = checkpoint.weight("w", torch.bfloat16, asked)
        assert isinstance(dense, DenseWeight)
        assert torch.equal(dense.tensor, w.bfloat16())


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_quantised_while_read(tmp_path, storage):
    w = matrix(50).bfloat16()
    save_file({"w": w, "odd": matrix(8, 40)}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    weight = checkpoint.weight("w", torch.bfloat16, storage)
    assert isinstance(weight, BlockWeight)
    expected = quantize(w, storage).dequantize()
    assert torch.equal(weight.dequantize(), expected)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(checkpoint.weight("w", torch.bfloat16, storage, order).dequantize(), expected[order])
    odd = checkpoint.weight("odd", torch.float32, storage)  # 40 inputs have no blocks
    assert isinstance(odd, DenseWeight)
    assert torch.equal(odd.tensor, matrix(8, 40))


def test_rows_of_floats(tmp_path):
    save_file({"w": matrix()}, tmp_path / "model.safetensors")
    order = torch.tensor([5, 0, 23])
    weight = SafetensorsCheckpoint(tmp_path).weight("w", torch.float32, None, order)
    assert torch.equal(weight.dequantize(), matrix()[order])


def test_shards(tmp_path):
    checkpoint = SafetensorsCheckpoint(sharded(tmp_path))
    assert checkpoint.shapes() == {"a": (24, 64), "norm": (64,), "b": (24, 64)}
    assert torch.equal(checkpoint.tensor("a"), matrix(seed=1))
    assert torch.equal(checkpoint.weight("b", torch.bfloat16).dequantize(), matrix(seed=2).bfloat16().float())


def test_tensors_outlive_the_file(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": matrix()}, file)
    checkpoint = SafetensorsCheckpoint(file)
    small, dense = checkpoint.tensor("w"), checkpoint.weight("w", torch.float32)
    with file.open("r+b") as stream:
        stream.seek(-matrix().nbytes, 2)
        stream.write(bytes(matrix().nbytes))
    assert torch.equal(small, matrix())
    assert torch.equal(dense.dequantize(), matrix())


def test_integer_tables_are_tensors_not_weights(tmp_path):
    table = torch.randperm(64).view(8, 8)
    save_file({"token_ordering": table, "huge": torch.tensor([2**40 + 1])}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("token_ordering").long(), table)
    with pytest.raises(ValueError, match=r"'token_ordering' holds integers \(I64\)"):
        checkpoint.weight("token_ordering", torch.float32)
    with pytest.raises(ValueError, match=r"'huge' \(I64\) holds integers beyond"):
        checkpoint.tensor("huge")


def test_requests_that_cannot_be_met(tmp_path):
    save_file({"model.norm": torch.ones(8), "w": matrix()}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor 'model\.nrom' among its 2; near it: model\.norm"):
        checkpoint.tensor("model.nrom")
    with pytest.raises(ValueError, match=r"'model\.norm' of shape \(8,\) is not a matrix"):
        checkpoint.weight("model.norm", torch.float32)
    with pytest.raises(ValueError, match="leave its 24 rows"):
        checkpoint.weight("w", torch.float32, None, torch.tensor([24]))


def test_values_that_are_not_finite_name_the_tensor(tmp_path):
    w = matrix()
    w[3, 3] = float("inf")
    save_file({"model.layers.7.mlp": w}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for asked in (None, "int4", "int8"):
        with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'model\.layers\.7\.mlp' holds"):
            checkpoint.weight("model.layers.7.mlp", torch.float32, asked)


def damage(data: bytes, how: str) -> bytes:
    cut = {"empty": 0, "in the length": 5, "in the header": 40, "in the data": len(data) - 7}
    if how in cut:
        return data[: cut[how]]
    if how == "length of 2**63":
        return (2**63).to_bytes(8, "little") + data[8:]
    if how == "header that is not JSON":
        return data[:8] + b"?" * 20 + data[28:]
    if how == "offsets past the end":
        return data.replace(b"[0,6144]", b"[0,9144]")
    assert how == "web page"
    return b"<!DOCTYPE html><html><body>404: Not Found</body></html>"


@pytest.mark.parametrize(
    "how",
    ["empty", "in the length", "in the header", "in the data", "length of 2**63", "header that is not JSON",
     "offsets past the end", "web page"],
)  # fmt: skip
@pytest.mark.parametrize("shards", [False, True])
def test_damaged_files_are_named_with_what_to_do(tmp_path, how, shards):
    file = sharded(tmp_path) / FIRST if shards else tmp_path / "model.safetensors"
    if not shards:
        save_file({"a": matrix()}, file)
    good = file.read_bytes()
    bad = damage(good, how)
    assert bad != good
    file.write_bytes(bad)
    message = refused(tmp_path)
    assert file.name in message
    assert "delete it and fetch it again" in message


def test_git_lfs_pointer(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.pt", "model.pth", "last.ckpt"]
)
@pytest.mark.parametrize("by", ["file", "folder"])
def test_pickle_is_refused_unread(tmp_path, name, by):
    (tmp_path / name).write_bytes(b"never opened")
    (tmp_path / "config.json").write_text("{}")
    message = refused(tmp_path / name if by == "file" else tmp_path)
    assert "convert to safetensors" in message
    assert name in message


def test_pickle_beside_safetensors_is_ignored(tmp_path):
    save_file({"w": matrix()}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert list(SafetensorsCheckpoint(tmp_path).shapes()) == ["w"]


def test_folders_without_weights(tmp_path):
    assert "holds no .gguf file, no model.safetensors and no" in refused(tmp_path)
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    assert f"name the file itself: {tmp_path / 'model-Q4_0.gguf'}" in refused(tmp_path)


def test_missing_shards_are_listed(tmp_path):
    sharded(tmp_path)
    (tmp_path / FIRST).unlink()
    (tmp_path / SECOND).unlink()
    message = refused(tmp_path)
    assert FIRST in message
    assert SECOND in message
    assert "fetch them" in message


def test_shards_without_an_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    assert f"without {INDEX}" in refused(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": FIRST, "norm": FIRST, "b": SECOND, "lost": SECOND},
        {"a": FIRST, "norm": FIRST, "b": FIRST, "lost": SECOND},  # b is there, but in the other shard
    ],
)
def test_index_and_shards_disagree(tmp_path, weight_map):
    message = refused(sharded(tmp_path, weight_map))
    assert f"lost ({SECOND})" in message
    assert (f"b ({FIRST})" in message) == (weight_map["b"] == FIRST)


def test_a_name_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file({"b": matrix(), "a": matrix()}, tmp_path / SECOND)
    message = refused(tmp_path)
    assert f"tensor 'a' is both in {FIRST} and in {SECOND}" in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "\xff\xfe"]
)
def test_damaged_index(tmp_path, text):
    (sharded(tmp_path) / INDEX).write_bytes(text.encode("latin-1"))
    message = refused(tmp_path)
    assert INDEX in message
    assert "fetch it again" in message


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\x"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, shard):
    assert "must lie beside it" in refused(sharded(tmp_path, {"a": shard}))


def test_an_index_of_pickles(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"never opened")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    assert "convert to safetensors" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("w.weight", torch.zeros(4, 4, dtype=torch.float8_e4m3fn)),
        ("w.weight", torch.zeros(4, 4, dtype=torch.float8_e5m2)),
        ("w.weight", torch.zeros(4, 4, dtype=torch.int8)),
        ("w.weight", torch.zeros(4, 4, dtype=torch.uint8)),
        ("w.qweight", torch.zeros(4, 4, dtype=torch.int32)),
        ("w.weight.absmax", torch.zeros(4)),
        ("w.weight.quant_state.bitsandbytes__nf4", torch.zeros(4)),
        ("w.weight_scale_inv", torch.zeros(4, 4)),
        ("w.weight", torch.zeros(4, 4, dtype=torch.complex64)),
    ],
)
def test_prequantised_checkpoints_are_refused(tmp_path, name, tensor):
    save_file({"good": matrix(), name: tensor}, tmp_path / "model.safetensors")
    message = refused(tmp_path)
    assert "w." in message
    assert "16-bit checkpoint" in message or "fetch" in message
