"""Matrices that other programs quantised: what they become, against the formula of each format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval.synthetic.packed.formats import FORMATS
from specdec.weights import BlockWeight, DenseWeight, SafetensorsCheckpoint

ROWS, COLUMNS = 144, 768
# Our bits and minimum, and the largest relative squared error: 0 where the layout holds the same numbers.
BECOMES = {
    **dict.fromkeys(("ct-g32", "ct-g64", "ct-g128", "ct-channel", "gptq", "gptq-v2"), (4, False, 0.0)),
    **dict.fromkeys(("ct-w8", "ct-w8a8", "gptq-8"), (8, False, 0.0)),
    **dict.fromkeys(("ct-asymmetric", "awq", "gptq-asymmetric"), (4, True, 2e-7)),
    **dict.fromkeys(("mlx-2", "mlx-3", "mlx-4"), (4, True, 0.0)),
    "mlx-5": (5, True, 0.0),
    **dict.fromkeys(("mlx-6", "mlx-8", "nf4", "nf4-double"), (8, False, 4e-5)),
    **dict.fromkeys(("fp8-tensor", "fp8-row", "fp8-block"), (8, False, 4e-5)),
}


def matrix(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def written(folder: Path, format: str, w: torch.Tensor) -> tuple[SafetensorsCheckpoint, torch.Tensor]:
    """A checkpoint with `w` as `a.weight`, and the floats that it stands for."""
    parts, floats = FORMATS[format].store(w)
    save_file({f"a.{part}": tensor.contiguous() for part, tensor in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FORMATS[format].config))
    return SafetensorsCheckpoint(folder), floats


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:.*takes 8.5 bits")
def test_a_matrix_is_what_its_format_says(format: str, tmp_path: Path) -> None:
    checkpoint, floats = written(tmp_path, format, matrix())
    bits, minimum, worst = BECOMES[format]
    assert checkpoint.shapes() == {"a.weight": (ROWS, COLUMNS)}
    weight = checkpoint.weight("a.weight", torch.float32)
    assert isinstance(weight, BlockWeight)
    assert (weight.blocks.bits, weight.blocks.minimum is not None) == (bits, minimum)
    error = float((weight.dequantize() - floats).square().sum() / floats.square().sum())
    assert error <= worst
    ((found, count, size),) = checkpoint.formats
    stored = {part: tensor.nbytes for part, tensor in FORMATS[format].store(matrix(ROWS, COLUMNS))[0].items()}
    assert (count, size) == (1, sum(nbytes for part, nbytes in stored.items() if part != "g_idx"))
    assert ("exact" in found.becomes) == (worst == 0)
    # As floats nothing is rounded, and `quantize` leaves blocks alone.
    assert torch.equal(checkpoint.weight("a.weight", torch.float32, "none").dequantize(), floats)
    assert torch.equal(checkpoint.tensor("a.weight"), floats)
    assert torch.equal(checkpoint.weight("a.weight", torch.float32, "int4").dequantize(), weight.dequantize())
    for quantize in (None, "none", "int4"):
        loaded = checkpoint.weight("a.weight", torch.bfloat16, quantize)
        assert loaded.nbytes == checkpoint.loaded_bytes("a.weight", torch.bfloat16, quantize)


@pytest.mark.parametrize("format", ["ct-asymmetric", "awq", "gptq", "nf4-double"])
@pytest.mark.filterwarnings("ignore:.*takes 8.5 bits")
def test_matrices_are_read_a_few_rows_at_a_time(format: str, tmp_path: Path) -> None:
    """More than a million weights: two chunks, the second of which begins inside of words and blocks."""
    checkpoint, floats = written(tmp_path, format, matrix(288, 4096))
    assert torch.equal(checkpoint.tensor("a.weight"), floats)
    whole = checkpoint.weight("a.weight", torch.float32).dequantize()
    assert float((whole - floats).square().sum() / floats.square().sum()) < 4e-5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:.*takes 8.5 bits")
def test_rows_in_any_order(format: str, tmp_path: Path) -> None:
    checkpoint, floats = written(tmp_path, format, matrix(144, 256))
    order = torch.randperm(144, generator=torch.Generator().manual_seed(1))[:50]
    whole = checkpoint.weight("a.weight", torch.float32).dequantize()
    assert torch.equal(checkpoint.weight("a.weight", torch.float32, "none", order).dequantize(), floats[order])
    assert torch.equal(checkpoint.weight("a.weight", torch.float32, None, order).dequantize(), whole[order])


def test_inputs_that_are_no_multiple_of_32_stay_floats(tmp_path: Path) -> None:
    checkpoint, floats = written(tmp_path, "ct-channel", matrix(32, 40))
    weight = checkpoint.weight("a.weight", torch.float32)
    assert isinstance(weight, DenseWeight)
    assert torch.equal(weight.tensor, floats)


def test_what_is_quantised_again_says_so_once_with_its_error(tmp_path: Path) -> None:
    checkpoint, _ = written(tmp_path, "nf4-double", matrix(64, 256))
    with pytest.warns(UserWarning, match=r"NF4 in blocks of 64, doubly quantised takes 8\.5 bits .* error 3.0e-05"):
        first = checkpoint.weight("a.weight", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = checkpoint.weight("a.weight", torch.float32)
    assert torch.equal(again.dequantize(), first.dequantize())


def test_a_module_of_mlx_may_have_bits_of_its_own(tmp_path: Path) -> None:
    """Under its own path, or under one with another prefix, which the sizes tell."""
    tensors, floats = {}, {}
    for module, bits in (("model.a", 4), ("model.b", 8), ("model.c", 8)):
        parts, floats[module] = FORMATS[f"mlx-{bits}"].store(matrix(32, 128))
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    own = {"bits": 8, "group_size": 64}
    config = {"quantization": {"bits": 4, "group_size": 64, "model.a": False, "model.b": own, "other.model.c": own}}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for module, expected in floats.items():
        assert torch.equal(checkpoint.tensor(f"{module}.weight"), expected)


def test_zero_points_as_bytes(tmp_path: Path) -> None:
    """As early versions of compressed-tensors left them: int8 [N, K / group], not packed."""
    parts, floats = FORMATS["ct-asymmetric"].store(matrix(32, 64))
    words = parts["weight_zero_point"].t().contiguous().view(torch.uint8)  # [groups, N / 2]
    zeros = torch.stack([words & 15, words >> 4], dim=-1).flatten(1).t().to(torch.int8) - 8
    parts["weight_zero_point"] = zeros.contiguous()
    save_file({f"a.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    assert torch.equal(SafetensorsCheckpoint(tmp_path).tensor("a.weight"), floats)


def test_scales_of_activations_and_biases_of_nothing_are_left_out(tmp_path: Path) -> None:
    parts, _ = FORMATS["gptq"].store(matrix(32, 64))
    parts |= {"input_scale": torch.ones(1), "bias": torch.zeros(32)}
    tensors = {f"a.{part}": tensor for part, tensor in parts.items()}
    save_file({**tensors, "b.bias": torch.zeros(32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FORMATS["gptq"].config))
    assert set(SafetensorsCheckpoint(tmp_path).shapes()) == {"a.weight", "b.bias"}
