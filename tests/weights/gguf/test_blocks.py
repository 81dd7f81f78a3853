"""Every type of blocks against the `gguf` package's dequantiser, on random blocks."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants

from eval.synthetic.packed.folders import bfloat16_on_lattice
from specdec.kernels import TABLES, unpack_blocks
from specdec.weights import GGUFCheckpoint
from specdec.weights.gguf.blocks import BLOCKS, USUAL
from specdec.weights.gguf.checkpoint import blocks_of
from specdec.weights.tensors import BlockWeight, pack
from tests.support.formats.gguf_blocks import floats, random_blocks

ROWS, COLUMNS = 48, 1024
EXACT = [kind for kind, ours in BLOCKS.items() if ours.exact]
ROUNDED = [kind for kind, ours in BLOCKS.items() if not ours.exact and not ours.sub]


def made(kind: Type, raw: np.ndarray) -> BlockWeight:
    ours = BLOCKS[kind]
    return pack(ROWS, COLUMNS, ours.bits, lambda i, j: blocks_of(raw[i:j], kind), "w", ours.table)


def write(
    path: Path, stored: dict[str, np.ndarray], kind: Type, beside: dict[str, np.ndarray] | None = None
) -> GGUFCheckpoint:
    writer = gguf.GGUFWriter(path, "llama")
    for name, raw in stored.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    for name, floats_ in (beside or {}).items():
        writer.add_tensor(name, floats_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFCheckpoint(path)


def relative_squared_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).square().sum() / theirs.square().sum())


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_blocks_that_fit_ours_keep_every_bit(kind: Type) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS)
    expected = torch.from_numpy(floats(raw, kind))
    assert expected.unique().numel() > 150
    assert torch.equal(made(kind, raw).dequantize(), expected)


@pytest.mark.parametrize("kind", ROUNDED, ids=lambda kind: kind.name)
def test_blocks_whose_scales_are_products_are_rounded_once(kind: Type) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS)
    expected = torch.from_numpy(floats(raw, kind))
    weight = made(kind, raw)
    values, scale, minimum = unpack_blocks(weight.blocks)
    # Each of scale and minimum carries half a unit in the last of 11 bits, or half of float16's smallest number.
    table = weight.blocks.table
    numbers = values.float() if table is None else TABLES[table].numbers[values.long()].float()
    largest = numbers.abs().view(ROWS, -1, 32).amax(-1)
    bound = largest * (scale.float().abs() * 2**-11 + 2**-25) * weight.blocks.unit
    if minimum is not None:
        bound += minimum.float().abs() * 2**-11 + 2**-25
    error = (weight.dequantize() - expected).abs().view(ROWS, -1, 32).amax(-1)
    assert (error <= bound * 1.001).all()
    assert 0 < relative_squared_error(weight.dequantize(), expected) < 1e-6


def test_the_smaller_of_two_scales_of_nvfp4_is_rounded_to_a_part_of_the_larger() -> None:
    raw = random_blocks(Type.NVFP4, ROWS, COLUMNS)
    expected = torch.from_numpy(quants.dequantize(raw, Type.NVFP4))
    ours = made(Type.NVFP4, raw).dequantize()
    scales = torch.from_numpy(quants.NVFP4.ue4m3_to_fp32(raw.reshape(ROWS, -1, 36)[..., :4]))
    pairs = scales.view(ROWS, -1, 2)
    larger = pairs.amax(-1, keepdim=True)
    error = (ours - expected).abs().view(ROWS, -1, 2, 16).amax(-1)
    assert (error <= 12 * larger / 64 / 2).all()
    near = pairs * 8 >= larger  # four bits each, and three between them
    assert near.any() and not error[near].any()
    assert 0 < relative_squared_error(ours, expected) < 1e-5


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_a_row_does_not_depend_on_others(kind: Type) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS, seed=1)
    whole = blocks_of(raw, kind)
    for mine, theirs in zip(blocks_of(raw[5:7], kind), whole, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs[5:7])


@pytest.mark.parametrize("kind", [Type.Q8_K, Type.Q1_0], ids=lambda kind: kind.name)
def test_types_that_the_gguf_package_does_not_read(kind: Type, tmp_path: Path) -> None:
    """As floats, as rows of a table, and as blocks; a scale that float16 does not hold is told."""
    raw = random_blocks(kind, ROWS, COLUMNS)
    checkpoint = write(tmp_path / "m.gguf", {"a": raw}, kind)
    expected = torch.from_numpy(floats(raw, kind))
    assert torch.equal(checkpoint.tensor("a"), expected)
    assert torch.equal(checkpoint.table("a").rows(torch.tensor([3, 1]), torch.float32), expected[[3, 1]])
    with warnings.catch_warnings(record=True):
        weight = checkpoint.weight("a", torch.float32)
    assert weight.nbytes == checkpoint.loaded_bytes("a", torch.float32)
    assert 8 * weight.nbytes / expected.numel() == (8.5 if kind is Type.Q8_K else 3.5)
    raw[0, :4] = np.array([1e9], np.float32).view(np.uint8) if kind is Type.Q8_K else 0x7B  # 61,280 twice
    with pytest.raises(ValueError, match="tensor 'a' holds values that are not finite, or too large for float16"):
        write(tmp_path / "m.gguf", {"a": raw}, kind).weight("a", torch.float32)


def test_experts_of_nvfp4_with_a_scale_each(tmp_path: Path) -> None:
    """Gate and up have them in the weights; what the outputs are multiplied by is a tensor of its own."""
    raw = random_blocks(Type.NVFP4, 4 * 16, 64).reshape(4, 16, -1)
    scales = np.array([0.5, 3.0, 0.001, 7.0], np.float32)
    stored = {f"blk.0.ffn_{name}.weight": raw for name in ("gate_up_exps", "down_exps")}
    beside = {f"blk.0.ffn_{name}.scale": scales for name in ("gate_up_exps", "down_exps")}
    expected = torch.from_numpy(quants.dequantize(raw, Type.NVFP4))
    checkpoint = write(tmp_path / "m.gguf", stored, Type.NVFP4, beside)
    assert checkpoint.shapes() == {**{name: (4, 16, 64) for name in stored}, "blk.0.ffn_down_exps.scale": (4,)}
    each = torch.from_numpy(scales)[:, None, None]
    order = torch.tensor([63, 0, 17, 40])
    for name, factor in (
        ("blk.0.ffn_gate_up_exps.weight", each),
        ("blk.0.ffn_down_exps.weight", torch.ones_like(each)),
    ):
        whole = expected * factor
        assert torch.equal(checkpoint.tensor(name), whole)
        assert torch.equal(checkpoint.weight(name, torch.float32, "none").dequantize(), whole.view(64, 64))
        with warnings.catch_warnings(record=True):
            weight = checkpoint.weight(name, torch.float32)
            some = checkpoint.weight(name, torch.float32, rows=order)
        ours = weight.dequantize().view(4, 16, 64)
        for expert in range(4):
            assert relative_squared_error(ours[expert], whole[expert]) < 1e-5
        assert torch.equal(some.dequantize(), ours.view(64, 64)[order])
        assert weight.nbytes == checkpoint.loaded_bytes(name, torch.float32)
    # Ollama's name for the outputs' scales leaves the other to the weights.
    beside["blk.0.ffn_gate_inp.per_expert_scale"] = scales
    checkpoint = write(tmp_path / "m.gguf", stored, Type.NVFP4, beside)
    assert torch.equal(checkpoint.tensor("blk.0.ffn_down_exps.weight"), expected * each)
    assert [*checkpoint.shapes()] == [*stored, "blk.0.ffn_gate_inp.per_expert_scale"]
    beside["blk.0.ffn_gate_up_exps.scale"] = scales[:3]
    with pytest.raises(ValueError, match=r"of shape \(3,\) is no scale of 'blk\.0\.ffn_gate_up_exps\.weight'"):
        write(tmp_path / "m.gguf", stored, Type.NVFP4, beside).weight("blk.0.ffn_gate_up_exps.weight", torch.float32)


def test_floats_that_were_trained_for_4_bits_are_counted_as_what_they_become(tmp_path: Path) -> None:
    trained, plain = bfloat16_on_lattice(128, 256), torch.randn(128, 256, dtype=torch.float32).bfloat16()
    for storage, native in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        kind = Type[storage]
        tensors = {"trained": trained, "plain": plain, "experts": trained.view(4, 32, 256), "odd": plain[:, :40]}
        raw = {name: tensor.to(native).contiguous().view(torch.uint8).numpy() for name, tensor in tensors.items()}
        checkpoint = write(tmp_path / "m.gguf", raw, kind)
        for name in raw:
            for quantize in ("int4", "int8", "none", None):
                weight = checkpoint.weight(name, torch.float32, quantize)
                assert weight.nbytes == checkpoint.loaded_bytes(name, torch.float32, quantize)
        for name in ("trained", "experts"):
            assert 8 * checkpoint.loaded_bytes(name, torch.float32, "int4") / trained.numel() == 4.5
        assert 8 * checkpoint.loaded_bytes("plain", torch.float32, "int4") / trained.numel() == 5


def test_scales_of_mxfp4_beyond_float16_are_no_silent_zeros() -> None:
    raw = random_blocks(Type.MXFP4, ROWS, COLUMNS)
    raw[:, 0] = 250
    with pytest.raises(ValueError, match="too large for float16 block scales"):
        made(Type.MXFP4, raw)


@pytest.mark.parametrize("kind", [*ROUNDED, Type.NVFP4], ids=lambda kind: kind.name)
def test_what_rounds_says_so_once_with_its_error(kind: Type, tmp_path: Path) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS)
    checkpoint = write(tmp_path / "m.gguf", {"a": raw, "b": raw}, kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight = checkpoint.weight("a", torch.float32)
        checkpoint.weight("b", torch.float32)
    said = [str(warning.message) for warning in caught]
    if kind in USUAL:
        assert said == []
        return
    (only,) = said
    error = relative_squared_error(weight.dequantize(), torch.from_numpy(floats(raw, kind)))
    told = float(re.search(r"relative squared error ([\d.e-]+)", only)[1])
    assert told == pytest.approx(error, rel=0.1)
    resident = 8 * weight.nbytes / (ROWS * COLUMNS)
    assert checkpoint.loaded_bytes("a", torch.float32) == weight.nbytes
    assert f"m.gguf: {kind.name} " in only and f"{resident:.1f} bits a weight in memory" in only
