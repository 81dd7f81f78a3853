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

from specdec.kernels import unpack_blocks
from specdec.weights import GGUFCheckpoint
from specdec.weights.gguf.blocks import BLOCKS, REFITTED, USUAL
from specdec.weights.gguf.checkpoint import blocks_of
from specdec.weights.tensors import BlockWeight, pack

ROWS, COLUMNS = 48, 1024
HALVES = {  # where float16 numbers lie in a block, besides at its beginning
    **dict.fromkeys((Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)),
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,), Type.TQ1_0: (52,), Type.TQ2_0: (64,),
    Type.MXFP4: (), Type.IQ1_M: (),
}  # fmt: skip
EXACT = [kind for kind, ours in BLOCKS.items() if ours.exact]
ROUNDED = [kind for kind, ours in BLOCKS.items() if not ours.exact]


def random_blocks(kind: Type, seed: int = 0) -> np.ndarray:
    """Every bit pattern of the integers, with scales of either sign and many magnitudes: [ROWS, bytes of a row]."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (ROWS, COLUMNS // block)
    raw = rng.integers(0, 256, (*shape, size), dtype=np.uint8)

    def halves() -> np.ndarray:
        return (rng.standard_normal((*shape, 1)) * 10.0 ** rng.uniform(-3, 0, (*shape, 1))).astype(np.float16)

    for offset in HALVES.get(kind, (0,)):
        raw[..., offset : offset + 2] = halves().view(np.uint8)
    if kind is Type.MXFP4:
        raw[..., 0] = rng.integers(104, 144, shape, dtype=np.uint8)  # 2^-24 .. 2^15: what float16 holds
    if kind is Type.IQ1_M:  # four bits of the scale on top of each of four numbers
        scales, bits = raw[..., 48:56].view(np.uint16), halves().view(np.uint16)
        scales &= 0x0FFF
        scales |= bits << np.array([12, 8, 4, 0], np.uint16) & np.uint16(0xF000)
    return raw.reshape(ROWS, -1)


def made(kind: Type, raw: np.ndarray) -> BlockWeight:
    return pack(ROWS, COLUMNS, BLOCKS[kind].bits if kind in BLOCKS else 8, lambda i, j: blocks_of(raw[i:j], kind), "w")


def relative_squared_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).square().sum() / theirs.square().sum())


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_blocks_that_fit_ours_keep_every_bit(kind: Type) -> None:
    raw = random_blocks(kind)
    expected = torch.from_numpy(quants.dequantize(raw, kind))
    assert expected.unique().numel() > 150
    assert torch.equal(made(kind, raw).dequantize(), expected)


@pytest.mark.parametrize("kind", ROUNDED, ids=lambda kind: kind.name)
def test_blocks_whose_scales_are_products_are_rounded_once(kind: Type) -> None:
    raw = random_blocks(kind)
    expected = torch.from_numpy(quants.dequantize(raw, kind))
    weight = made(kind, raw)
    values, scale, minimum = unpack_blocks(weight.blocks)
    # Each of scale and minimum carries half a unit in the last of 11 bits, or half of float16's smallest number.
    zero = 0 if minimum is not None or BLOCKS[kind].bits == 8 else weight.blocks.zero
    largest = (values.float() - zero).abs().view(ROWS, -1, 32).amax(-1)
    bound = largest * (scale.float().abs() * 2**-11 + 2**-25)
    if minimum is not None:
        bound += minimum.float().abs() * 2**-11 + 2**-25
    error = (weight.dequantize() - expected).abs().view(ROWS, -1, 32).amax(-1)
    assert (error <= bound * 1.001).all()
    assert 0 < relative_squared_error(weight.dequantize(), expected) < 1e-6


@pytest.mark.parametrize("kind", REFITTED, ids=lambda kind: kind.name)
def test_blocks_that_do_not_fit_are_quantised_again(kind: Type) -> None:
    raw = random_blocks(kind)
    expected = torch.from_numpy(quants.dequantize(raw, kind))
    ours = made(kind, raw).dequantize()
    largest = expected.abs().view(ROWS, -1, 32).amax(-1).repeat_interleave(32, dim=1)
    assert ((ours - expected).abs() <= largest / 254 * 1.001 + 2**-25).all()
    assert 0 < relative_squared_error(ours, expected) < 5e-5


@pytest.mark.parametrize("kind", [*BLOCKS, *REFITTED], ids=lambda kind: kind.name)
def test_a_row_does_not_depend_on_others(kind: Type) -> None:
    raw = random_blocks(kind, seed=1)
    whole = blocks_of(raw, kind)
    for mine, theirs in zip(blocks_of(raw[5:7], kind), whole, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs[5:7])


def test_scales_of_mxfp4_beyond_float16_are_no_silent_zeros() -> None:
    raw = random_blocks(Type.MXFP4)
    raw[:, 0] = 250
    with pytest.raises(ValueError, match="too large for float16 block scales"):
        made(Type.MXFP4, raw)


@pytest.mark.parametrize("kind", [*ROUNDED, *REFITTED], ids=lambda kind: kind.name)
def test_what_rounds_says_so_once_with_its_error(kind: Type, tmp_path: Path) -> None:
    raw = random_blocks(kind)
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
    assert f"m.gguf: {kind.name} " in only and f"{resident:.1f} bits a weight in memory" in only
