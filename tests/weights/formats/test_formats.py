"""Matrices that other programs quantised: what they become, against the formula of each format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval.synthetic.packed.formats import FORMATS
from specdec.kernels import BlockForm
from specdec.weights import BlockWeight, DenseWeight, SafetensorsCheckpoint
from specdec.weights.tensors import block_bytes

ROWS, COLUMNS = 144, 768
# Our form, and the largest relative squared error: 0 where the layout holds the same numbers.
TABLE, HALVES = BlockForm(4, table=True), BlockForm(4, table=True, sub=True)
BECOMES = {
    **dict.fromkeys(("ct-g32", "ct-g64", "ct-g128", "ct-channel", "gptq", "gptq-v2"), (BlockForm(4), 0.0)),
    **dict.fromkeys(("ct-w8", "ct-w8a8", "gptq-8"), (BlockForm(8), 0.0)),
    **dict.fromkeys(("ct-asymmetric", "awq", "gptq-asymmetric"), (BlockForm(4, minimum=True), 2e-7)),
    **dict.fromkeys(("mlx-2", "mlx-3", "mlx-4"), (BlockForm(4, minimum=True), 0.0)),
    "mlx-5": (BlockForm(5, minimum=True), 0.0),
    **dict.fromkeys(("mlx-6", "mlx-8", "mlx-mxfp8"), (BlockForm(8), 4e-5)),
    **dict.fromkeys(("fp8-tensor", "fp8-row", "fp8-block"), (BlockForm(8), 4e-5)),
    **dict.fromkeys(("nf4", "nf4-double"), (TABLE, 3e-5)),
    "bnb-fp4": (TABLE, 4e-5),
    **dict.fromkeys(("mlx-mxfp4", "ct-mxfp4"), (TABLE, 0.0)),
    "mlx-nvfp4": (HALVES, 5e-6),
    **dict.fromkeys(("ct-nvfp4", "modelopt-nvfp4"), (HALVES, 5e-6)),  # and one rounding of the scale
}


def matrix(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def spread(rows: int, columns: int) -> torch.Tensor:
    """Sixteens of which one may be a hundred times the next: scales of e4m3 that seven bits do not have."""
    size = 10 ** (
        torch.rand(rows, columns // 16, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * 2
    )
    return (matrix(rows, columns).view(rows, -1, 16) * size).flatten(1)


def written(folder: Path, format: str, w: torch.Tensor) -> tuple[SafetensorsCheckpoint, torch.Tensor]:
    """A checkpoint with `w` as `a.weight`, and the floats that it stands for."""
    parts, floats = FORMATS[format].store(w)
    save_file({f"a.{part}": tensor.contiguous() for part, tensor in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FORMATS[format].config))
    return SafetensorsCheckpoint(folder), floats


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:.*bits a weight in memory")
def test_a_matrix_is_what_its_format_says(format: str, tmp_path: Path) -> None:
    checkpoint, floats = written(tmp_path, format, matrix())
    form, worst = BECOMES[format]
    assert checkpoint.shapes() == {"a.weight": (ROWS, COLUMNS)}
    weight = checkpoint.weight("a.weight", torch.float32)
    assert isinstance(weight, BlockWeight)
    assert weight.blocks.form == form
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
@pytest.mark.filterwarnings("ignore:.*bits a weight in memory")
def test_matrices_are_read_a_few_rows_at_a_time(format: str, tmp_path: Path) -> None:
    """More than a million weights: two chunks, the second of which begins inside of words and blocks."""
    checkpoint, floats = written(tmp_path, format, matrix(288, 4096))
    assert torch.equal(checkpoint.tensor("a.weight"), floats)
    whole = checkpoint.weight("a.weight", torch.float32).dequantize()
    assert float((whole - floats).square().sum() / floats.square().sum()) < 4e-5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:.*bits a weight in memory")
def test_rows_in_any_order(format: str, tmp_path: Path) -> None:
    checkpoint, floats = written(tmp_path, format, matrix(144, 256))
    order = torch.randperm(144, generator=torch.Generator().manual_seed(1))[:50]
    whole = checkpoint.weight("a.weight", torch.float32).dequantize()
    assert torch.equal(checkpoint.weight("a.weight", torch.float32, "none", order).dequantize(), floats[order])
    assert torch.equal(checkpoint.weight("a.weight", torch.float32, None, order).dequantize(), whole[order])


@pytest.mark.filterwarnings("ignore:.*bits a weight in memory")
def test_other_tables_of_bitsandbytes_are_looked_at(tmp_path: Path) -> None:
    """In another order the codes are moved; a table that is none of ours is fitted to 8 bits."""
    parts, floats = FORMATS["nf4"].store(matrix(32, 128))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    flat = torch.stack([parts["weight"] >> 4, parts["weight"] & 15], dim=-1).flatten().long()
    moved = order.argsort()[flat].to(torch.uint8).view(-1, 2)
    changes = {"weight": moved[:, :1] << 4 | moved[:, 1:], "weight.quant_map": parts["weight.quant_map"][order]}
    for name, bits, changed in (
        ("moved", 4, parts | changes),
        ("own", 8, parts | {"weight.quant_map": torch.linspace(-1, 1, 16, dtype=torch.float32)}),
    ):
        (folder := tmp_path / name).mkdir()
        save_file({f"a.{part}": t.contiguous() for part, t in changed.items()}, folder / "model.safetensors")
        checkpoint = SafetensorsCheckpoint(folder)
        theirs = checkpoint.tensor("a.weight")
        assert torch.equal(theirs, floats) == (name == "moved")
        weight = checkpoint.weight("a.weight", torch.float32)
        assert weight.packed is not None and weight.packed.bits == bits
        assert float((weight.dequantize() - theirs).square().sum() / theirs.square().sum()) < 4e-5


@pytest.mark.filterwarnings("ignore:.*bits a weight in memory")
def test_blocks_over_the_ends_of_rows(tmp_path: Path) -> None:
    """Of 96 inputs: the second block of 64 has the end of a row and the beginning of the next."""
    checkpoint, floats = written(tmp_path, "nf4-double", matrix(32, 96))
    weight = checkpoint.weight("a.weight", torch.float32)
    assert weight.nbytes == block_bytes((32, 96), 4, False)
    assert float((weight.dequantize() - floats).square().sum() / floats.square().sum()) < 3e-5


@pytest.mark.parametrize("format", ["mlx-nvfp4", "ct-nvfp4", "modelopt-nvfp4"])
@pytest.mark.filterwarnings("ignore:.*bits a weight in memory")
def test_the_smaller_of_two_scales_is_rounded_to_a_part_of_the_larger(format: str, tmp_path: Path) -> None:
    checkpoint, floats = written(tmp_path, format, spread(64, 256))
    ours = checkpoint.weight("a.weight", torch.float32).dequantize()
    stored = FORMATS[format].store(spread(64, 256))[0]
    bytes_ = stored["scales" if format.startswith("mlx") else "weight_scale"].view(torch.float8_e4m3fn)
    pairs = bytes_.float().view(64, -1, 2)
    whole = float(
        stored.get("weight_scale_2", 1 / stored.get("weight_global_scale", torch.ones(1, dtype=torch.float32)))
    )
    larger = pairs.amax(-1, keepdim=True)
    error = (ours - floats).abs().view(64, -1, 2, 16).amax(-1) / whole
    assert (error <= 6 * larger * (0.5 / 64 + 2**-11)).all()
    near = pairs * 8 >= larger
    assert near.any() and not near.all() and (error[near] <= (6 * larger * 2**-11).expand_as(error)[near]).all()
    assert 0 < float((ours - floats).square().sum() / floats.square().sum()) < 1e-5


def test_inputs_that_are_no_multiple_of_32_stay_floats(tmp_path: Path) -> None:
    checkpoint, floats = written(tmp_path, "ct-channel", matrix(32, 40))
    weight = checkpoint.weight("a.weight", torch.float32)
    assert isinstance(weight, DenseWeight)
    assert torch.equal(weight.tensor, floats)


@pytest.mark.parametrize(
    ("format", "told"),
    [
        (
            "nf4-double",
            r"NF4 in blocks of 64, doubly quantised takes 4\.5 bits a weight in memory, and 4\.7 in the file",
        ),
        ("fp8-row", r"a scale for each row takes 8\.5 bits a weight in memory, and 8\.1 in the file"),
        ("mlx-nvfp4", r"MLX, NVFP4 takes 5\.0 bits a weight in memory, and 4\.5 in the file"),
    ],
)
def test_what_has_other_weights_says_so_once_with_its_error(format: str, told: str, tmp_path: Path) -> None:
    checkpoint, floats = written(tmp_path, format, spread(64, 256))
    with pytest.warns(UserWarning, match=told) as caught:
        first = checkpoint.weight("a.weight", torch.float32)
    error = float((first.dequantize() - floats).square().sum() / floats.square().sum())
    assert f"relative squared error {error:.1e}, measured on a.weight" in str(caught[0].message)
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
    parts |= {"input_scale": torch.ones(1, dtype=torch.float32), "bias": torch.zeros(32, dtype=torch.float32)}
    tensors = {f"a.{part}": tensor for part, tensor in parts.items()}
    save_file({**tensors, "b.bias": torch.zeros(32, dtype=torch.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FORMATS["gptq"].config))
    assert set(SafetensorsCheckpoint(tmp_path).shapes()) == {"a.weight", "b.bias"}
