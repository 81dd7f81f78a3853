"""Quantised checkpoints that are damaged, mislabelled or of formats that are not read: a sentence, in a second."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdec
from eval.synthetic.packed.folders import write_packed
from eval.synthetic.packed.formats import FORMATS, bit_stream
from specdec.model import quantized
from specdec.weights import SafetensorsCheckpoint
from tests.support.tiny import tiny_model

Tensors = dict[str, torch.Tensor]


def written(folder: Path, format: str, changes: Tensors, config: dict[str, Any] | None = None) -> None:
    """Write a matrix `a.weight` in `format`, with `changes` of its parts; an empty one is left out."""
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    parts = FORMATS[format].store(w)[0] | changes
    save_file({f"a.{part}": t.contiguous() for part, t in parts.items() if t.numel()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FORMATS[format].config if config is None else config))


def refused(folder: Path) -> str:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"\A.+\Z") as raised:
        SafetensorsCheckpoint(folder).weight("a.weight", torch.float32)
    assert time.perf_counter() - began < 1
    message = str(raised.value)
    assert message.startswith(str(folder)) and message.isprintable()
    return message


NONE = torch.empty(0, dtype=torch.float32)


@pytest.mark.parametrize(
    ("format", "changes"),
    [
        ("ct-g32", {"weight_shape": NONE}),
        ("ct-g32", {"weight_shape": torch.tensor([32, 0])}),
        ("ct-g32", {"weight_shape": torch.tensor([33, 128])}),
        ("ct-g32", {"weight_shape": torch.tensor([32, 120])}),
        ("ct-g32", {"weight_shape": torch.tensor([1 << 60, 1 << 60])}),
        ("ct-g32", {"weight_scale": NONE}),
        ("ct-g32", {"weight_scale": torch.ones(32, 3, dtype=torch.float32)}),
        ("ct-g32", {"weight_scale": torch.ones(32, dtype=torch.float32)}),
        ("ct-asymmetric", {"weight_zero_point": torch.zeros(32, 4, dtype=torch.int32)}),
        ("ct-w8a8", {"weight_scale": torch.ones(31, dtype=torch.float32)}),
        ("mlx-4", {"scales": NONE}),
        ("mlx-4", {"biases": torch.ones(32, 1, dtype=torch.float32)}),
        ("mlx-4", {"weight": torch.zeros(31, 16, dtype=torch.uint32)}),
        ("mlx-4", {"weight": torch.zeros(32, 7, dtype=torch.uint32)}),
        ("awq", {"qzeros": NONE}),
        ("awq", {"scales": torch.ones(2, 33, dtype=torch.float32).half()}),
        ("gptq", {"qzeros": torch.zeros(2, 5, dtype=torch.int32)}),
        ("gptq", {"qweight": torch.zeros(16, 31, dtype=torch.int32)}),
        ("nf4", {"weight.absmax": NONE}),
        ("nf4", {"weight.quant_map": torch.zeros(15, dtype=torch.float32)}),
        ("nf4", {"weight": torch.zeros(32 * 63, 1, dtype=torch.uint8)}),
        ("nf4-double", {"weight.nested_quant_map": NONE}),
        ("nf4-double", {"weight.nested_absmax": torch.zeros(9, dtype=torch.float32)}),
        ("mlx-mxfp4", {"scales": torch.zeros(32, 3, dtype=torch.uint8)}),
        ("mlx-nvfp4", {"scales": torch.zeros(31, 8, dtype=torch.uint8)}),
        ("mlx-mxfp4", {"weight": torch.zeros(32, 7, dtype=torch.uint32)}),
        ("ct-nvfp4", {"weight_scale": NONE}),
        ("ct-nvfp4", {"weight_global_scale": NONE}),
        ("ct-nvfp4", {"weight_global_scale": torch.ones(2, dtype=torch.float32)}),
        ("ct-mxfp4", {"weight_scale": torch.ones(32, 4, dtype=torch.float32)}),
        ("ct-mxfp4", {"weight_packed": torch.zeros(32, 63, dtype=torch.uint8)}),
        ("modelopt-nvfp4", {"weight": torch.zeros(31, 64, dtype=torch.uint8)}),
        ("modelopt-nvfp4", {"weight_scale": torch.ones(32, 7, dtype=torch.float32).to(torch.float8_e4m3fn)}),
        ("fp8-row", {"weight_scale": NONE}),
        ("fp8-row", {"weight_scale": torch.ones(31, 1, dtype=torch.float32)}),
        ("fp8-block", {"weight_scale_inv": torch.ones(2, 2, dtype=torch.float32)}),
    ],
)
def test_parts_that_do_not_fit(format: str, changes: Tensors, tmp_path: Path) -> None:
    written(tmp_path, format, changes)
    message = refused(tmp_path)
    assert "'a.weight' is no matrix of" in message
    assert message.endswith("fetch both again")


@pytest.mark.parametrize(
    ("format", "changes", "config", "told"),
    [
        ("ct-g32", {"weight_g_idx": torch.zeros(128, dtype=torch.int32)}, None, "activation order"),
        ("gptq", {"g_idx": torch.arange(128).flip(0).to(torch.int32) // 64}, None, "activation order"),
        ("gptq", {}, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, "zeros that are not in"),
        ("gptq", {}, {"quant_method": "awq", "bits": 4}, "says 'awq', and the tensors are those of gptq"),
        ("mlx-4", {"weight": torch.zeros(2, 32, 16, dtype=torch.uint32)}, None, "experts of a mixture"),
        ("awq", {}, {"quant_method": "gptq", "bits": 4}, "says 'gptq', and the tensors are those of awq"),
        ("gptq", {}, {"quant_method": "gptq", "bits": "four"}, "'bits' must be a whole number"),
        ("gptq", {}, {"quant_method": ["gptq"]}, "'quant_method' must be a text"),
        ("mlx-mxfp4", {"scales": torch.full((32, 4), 255, dtype=torch.uint8)}, None, "not finite"),
        ("mlx-mxfp4", {"scales": torch.full((32, 4), 150, dtype=torch.uint8)}, None, "too large for float16"),
        ("mlx-nvfp4", {"scales": torch.full((32, 8), 127, dtype=torch.uint8)}, None, "not finite"),
        ("ct-nvfp4", {"weight_packed": torch.zeros(2, 32, 64, dtype=torch.uint8)}, None, "experts of a mixture"),
        (
            "ct-nvfp4",
            {"weight_global_scale": torch.zeros(1, dtype=torch.float32)},
            None,
            "is 0.0, by which nothing can be scaled",
        ),
        (
            "modelopt-nvfp4",
            {"weight_scale_2": torch.tensor(torch.nan, dtype=torch.float32)},
            None,
            "is nan, by which nothing",
        ),
        (
            "nf4",
            {"weight.quant_state.bitsandbytes__nf5": torch.zeros(2, dtype=torch.float32).byte()},
            None,
            "a kind that bitsandbytes does",
        ),
        ("nf4", {"weight": NONE}, None, "there is no a.weight that it belongs to"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": torch.full((9,), 123, dtype=torch.uint8)}, None, "no JSON"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": torch.zeros(1 << 17)}, None, "no JSON"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b"{}")).byte()}, None, "no 'shape'"),
        ("ct-g32", {"weight": torch.ones(32, 128, dtype=torch.float32)}, None, "stored twice"),
        ("ct-g32", {"weight_scale": torch.full((32, 4), torch.inf)}, None, "not finite"),
        ("awq", {"scales": torch.full((2, 32), torch.nan).half()}, None, "not finite"),
        ("nf4", {"weight.absmax": torch.full((64,), torch.inf)}, None, "not finite"),
    ],
)
def test_what_else_may_be_wrong(
    format: str, changes: Tensors, config: dict[str, Any] | None, told: str, tmp_path: Path
) -> None:
    written(tmp_path, format, changes, None if config is None else {"quantization_config": config})
    assert told in refused(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "method", "told"),
    [
        ({"W_q": torch.zeros(4, 4, dtype=torch.uint8)}, "hqq", "HQQ"),
        ({"W_q": torch.zeros(4, 4, dtype=torch.uint8)}, None, "HQQ"),
        (
            {"weight": torch.zeros(4, 4, dtype=torch.int8), "weight_scales": torch.ones(4, dtype=torch.float32)},
            "eetq",
            "EETQ",
        ),
        (
            {"weight": torch.zeros(4, 4, dtype=torch.int8), "SCB": torch.ones(4, dtype=torch.float32)},
            "bitsandbytes",
            "LLM.int8",
        ),
        (
            {"weight": torch.zeros(4, 2, dtype=torch.uint8), "weight_scale_2": torch.ones(1, dtype=torch.float32)},
            "modelopt",
            "modelopt in another",
        ),
        ({"weight._data": torch.zeros(4, 4, dtype=torch.int8)}, "quanto", "quanto"),
        ({"_weight_qdata": torch.zeros(4, 4, dtype=torch.int8)}, "torchao", "torchao"),
        ({"codes": torch.zeros(4, 4, dtype=torch.int8)}, "aqlm", "AQLM"),
        ({"weight": torch.zeros(4, 4, dtype=torch.uint8)}, "bitnet", "BitNet"),
        ({"weight": torch.zeros(4, 4, dtype=torch.uint8)}, "my\nown", "the method 'my"),
    ],
)
def test_formats_that_are_not_read_are_named_with_those_that_are(
    tensors: Tensors, method: str | None, told: str, tmp_path: Path
) -> None:
    save_file({f"a.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    message = refused(tmp_path)
    assert f"quantised by {told}" in message or f"{told}, which is not read" in message
    for word in ("16-bit checkpoint", "quantize='int4'", "GGUF file", "compressed-tensors W4A16"):
        assert word in message


def test_bits_that_are_not_read(tmp_path: Path) -> None:
    w = torch.randint(0, 8, (32, 128), generator=torch.Generator().manual_seed(0))
    parts = {
        "qweight": bit_stream(w, 3).t(),
        "qzeros": bit_stream(w[:2, :32], 3),
        "scales": torch.ones(2, 32, dtype=torch.float32).half(),
    }
    written(tmp_path, "gptq", parts, {"quantization_config": {"quant_method": "gptq", "bits": 3}})
    assert "GPTQ of 3 bits, which is not read" in refused(tmp_path)


def test_a_whole_folder_that_is_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zeros of the last matrix are elsewhere: found while the quantised form is being written."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized, "LEAST", 0)
    tiny_model("llama").save_pretrained(tmp_path / "floats")
    write_packed(tmp_path / "floats", tmp_path / "packed", "gptq")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.self_attn.o_proj.qzeros"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"qzeros: zeros that are not in the middle"):
        specdec.load(tmp_path / "packed", drafter=None, quantize="int4", device="cpu")
    assert [path.name for path in (tmp_path / "cache" / "quantized").iterdir() if path.suffix != ".lock"] == []


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "floats")
    write_packed(tmp_path / "floats", tmp_path / "packed", "mlx-4")
    file = tmp_path / "packed" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="delete it and fetch it again"):
        specdec.load(tmp_path / "packed", drafter=None, device="cpu")
