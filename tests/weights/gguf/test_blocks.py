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

from specdec.kernels import TABLES, unpack_blocks
from specdec.weights import GGUFCheckpoint
from specdec.weights.gguf.blocks import BLOCKS, USUAL
from specdec.weights.gguf.checkpoint import blocks_of
from specdec.weights.tensors import BlockWeight, pack
from tests.support.formats.gguf_blocks import random_blocks

ROWS, COLUMNS = 48, 1024
EXACT = [kind for kind, ours in BLOCKS.items() if ours.exact]
ROUNDED = [kind for kind, ours in BLOCKS.items() if not ours.exact and not ours.sub]


def made(kind: Type, raw: np.ndarray) -> BlockWeight:
    ours = BLOCKS[kind]
    return pack(ROWS, COLUMNS, ours.bits, lambda i, j: blocks_of(raw[i:j], kind), "w", ours.table)


def relative_squared_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).square().sum() / theirs.square().sum())


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_blocks_that_fit_ours_keep_every_bit(kind: Type) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS)
    expected = torch.from_numpy(quants.dequantize(raw, kind))
    assert expected.unique().numel() > 150
    assert torch.equal(made(kind, raw).dequantize(), expected)


@pytest.mark.parametrize("kind", ROUNDED, ids=lambda kind: kind.name)
def test_blocks_whose_scales_are_products_are_rounded_once(kind: Type) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS)
    expected = torch.from_numpy(quants.dequantize(raw, kind))
    weight = made(kind, raw)
    values, scale, minimum = unpack_blocks(weight.blocks)
    # Each of scale and minimum carries half a unit in the last of 11 bits, or half of float16's smallest number.
    numbers = values.float() if minimum is not None else TABLES[weight.blocks.table].numbers[values.long()].float()
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


def test_scales_of_mxfp4_beyond_float16_are_no_silent_zeros() -> None:
    raw = random_blocks(Type.MXFP4, ROWS, COLUMNS)
    raw[:, 0] = 250
    with pytest.raises(ValueError, match="too large for float16 block scales"):
        made(Type.MXFP4, raw)


@pytest.mark.parametrize("kind", [*ROUNDED, Type.NVFP4], ids=lambda kind: kind.name)
def test_what_rounds_says_so_once_with_its_error(kind: Type, tmp_path: Path) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in ("a", "b"):
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight = checkpoint.weight("a", torch.float32)
        checkpoint.weight("b", torch.float32)
    said = [str(warning.message) for warning in caught]
    if kind in USUAL:
        assert said == []
        return
    (only,) = said
    error = relative_squared_error(weight.dequantize(), torch.from_numpy(quants.dequantize(raw, kind)))
    told = float(re.search(r"relative squared error ([\d.e-]+)", only)[1])
    assert told == pytest.approx(error, rel=0.1)
    resident = 8 * weight.nbytes / (ROWS * COLUMNS)
    assert checkpoint.loaded_bytes("a", torch.float32) == weight.nbytes
    assert f"m.gguf: {kind.name} " in only and f"{resident:.1f} bits a weight in memory" in only
