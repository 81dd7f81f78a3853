"""The per-layer embedding of Gemma 4 E2B and E4B stays in its file, and its rows are read when they are needed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants
from safetensors.torch import load_file

import specdec
from specdec.memory.plan import loaded_bytes
from specdec.model import quantized
from specdec.model.names import PER_LAYER_TABLE
from specdec.open import open_checkpoint
from specdec.weights.checkpoint import StoredRows
from specdec.weights.gguf.checkpoint import GGUFCheckpoint
from specdec.weights.safetensors import SafetensorsCheckpoint
from tests.support.tiny import prompt, tiny_model
from tests.support.tiny_gguf import write_model

FAMILY = "gemma4-e2b"
NAME = f"model.{PER_LAYER_TABLE}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = copy.deepcopy(tiny_model(FAMILY))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def stored(model: Any) -> StoredRows:
    table = model.decoder.per_layer.embedding
    assert isinstance(table, StoredRows)
    return table


def greedy(model: Any, **arguments: Any) -> list[int]:
    return model.generate(prompt(20), max_new_tokens=40, do_sample=False, **arguments)[0].tolist()


@pytest.mark.parametrize("kind", [Type.Q6_K, Type.Q4_K, Type.Q4_0, Type.BF16, Type.F32])
def test_rows_of_a_gguf_file_are_those_of_its_tensor(kind: Type, tmp_path: Path) -> None:
    floats = np.random.default_rng(0).standard_normal((40, 512)).astype(np.float32)
    if kind in (Type.Q6_K, Type.Q4_K):
        size = 512 // 256 * (210 if kind is Type.Q6_K else 144)
        raw = np.random.default_rng(1).integers(0, 256, (40, size), dtype=np.uint8)
        at = slice(208, 210) if kind is Type.Q6_K else slice(0, 4)  # the scales are finite
        raw.reshape(40, 2, -1)[..., at] = np.full(at.stop - at.start, 0x11, dtype=np.uint8)
    else:
        raw = quants.quantize(floats, kind)
    writer = GGUFWriter(tmp_path / "m.gguf", "gemma4")
    writer.add_tensor("before", np.ones(7, dtype=np.float32))
    writer.add_tensor("table", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    table, whole = checkpoint.table("table"), checkpoint.tensor("table")
    assert table.shape == (40, 512) and table.nbytes == 0
    ids = torch.tensor([3, 39, 0, 3])
    assert torch.equal(table.rows(ids, torch.float32), whole[ids])
    assert torch.equal(table.dequantize(), whole)
    assert table.rows(ids, torch.bfloat16).dtype is torch.bfloat16
    x = torch.randn(2, 512)
    torch.testing.assert_close(table.linear(x), x @ whole.T, rtol=1e-5, atol=1e-4)  # 512 products, in another order
    with pytest.raises(IndexError, match="from 0 to 39"):
        table.rows(torch.tensor([40]), torch.float32)


def test_a_gguf_model_computes_what_transformers_does_with_its_table(tmp_path: Path) -> None:
    ours = specdec.load(write_model(tmp_path / "m.gguf", FAMILY, Type.Q8_0), quantize="none", device="cpu")
    assert stored(ours).nbytes == 0
    theirs = copy.deepcopy(tiny_model(FAMILY))
    theirs.load_state_dict(dict(ours.named_parameters()), strict=False)
    with torch.inference_mode():
        expected = theirs(prompt(60)).logits[0]
    assert float((ours(prompt(60)).logits[0] - expected).abs().max() / expected.abs().max()) < 1e-4
    assert greedy(ours) == greedy(theirs) == greedy(ours, speculation=False)


def test_a_folder_s_table_stays_in_its_shard(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    ours = specdec.load(folder, drafter=None, device="cpu")
    shards = [load_file(file) for file in folder.glob("*.safetensors")]
    (whole,) = (shard[NAME] for shard in shards if NAME in shard)
    assert whole.dtype is torch.bfloat16
    assert torch.equal(stored(ours).dequantize(), whole.float())
    in_memory = greedy(specdec.load(folder, drafter=None, quantize="int4", device="cpu"))
    monkeypatch.setattr(quantized, "LEAST", 0)
    for _ in range(2):
        mapped = specdec.load(folder, drafter=None, quantize="int4", device="cpu")
        assert greedy(mapped) == in_memory
    (file,) = (tmp_path / "cache" / "quantized").glob("*.packed")
    spec, source, *_ = open_checkpoint(folder)
    assert source.stays_in_file(PER_LAYER_TABLE)
    assert file.stat().st_size < 1.2 * loaded_bytes(spec, source, "int4", torch.float32) + 100_000
    norm = 4 * spec.per_layer_input  # of the projection, which `nbytes` leaves out
    assert mapped.decoder.nbytes + norm == loaded_bytes(spec, source, "int4", torch.float32)


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", FAMILY, Type.Q8_0)
    model = specdec.load(path, drafter=None, device="cpu")
    text = greedy(model)
    copied = path.read_bytes()
    path.unlink()
    path.write_bytes(copied[:100])
    assert greedy(model) == text  # what was opened goes on
    path.write_bytes(copied)
    model = specdec.load(path, drafter=None, device="cpu")
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match="has become shorter while it was in use"):
        greedy(model)


def test_a_table_that_is_none_is_refused(folder: Path) -> None:
    checkpoint = SafetensorsCheckpoint(folder)
    with pytest.raises(ValueError, match="is not a matrix"):
        checkpoint.table("model.norm.weight")
    with pytest.raises(ValueError, match="there is no tensor"):
        checkpoint.table("model.norm.wait")
