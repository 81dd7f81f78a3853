"""Dense and block weights, and the two quantisers: bounds for every block, and the awkward blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from specdec.kernels import unpack_blocks
from specdec.weights import BlockWeight, DenseWeight, quantize, table_weight
from specdec.weights import tensors as module
from specdec.weights.tensors import block_bytes, convert


def gaussian(rows: int = 48, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_block(error: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each block of 32: [N, K] -> [N * K/32]."""
    return error.double().square().reshape(-1, 32).sum(-1)


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 300.0])
def test_int8_error_is_at_most_half_a_step(magnitude):
    w = gaussian() * magnitude
    block = quantize(w, "int8")
    values, scale, minimum = unpack_blocks(block.blocks)
    assert minimum is None
    assert values.abs().max() <= 127
    half_step = scale.float().repeat_interleave(32, dim=1) / 2
    assert ((block.dequantize() - w).abs() <= half_step * (1 + 1e-5)).all()
    largest = w.view(48, 3, 32).abs().amax(-1)
    # the step is no larger than it must be: max / 127, but for float16
    assert (scale.float() <= largest / 127 * (1 + 2**-11) + 2**-24).all()


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "far from zero", "small"])
def test_int4_is_never_worse_than_q4_1(kind):
    w = gaussian(64, 256)
    if kind == "heavy tails":
        w = w**3
    elif kind == "far from zero":
        w = w * 0.1 + 3
    elif kind == "small":
        w = w * 2e-6  # scales of a few float16 subnormal steps
    ours = by_block(quantize(w, "int4").dequantize() - w)
    plain = quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_1)
    theirs = by_block(torch.from_numpy(quants.dequantize(plain, gguf.GGMLQuantizationType.Q4_1)) - w)
    assert (ours <= theirs * 1.0001 + 1e-18).all()


def test_int4_search_removes_a_tenth_of_the_error():
    w = gaussian(128, 512)
    plain = quants.dequantize(
        quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_1), gguf.GGMLQuantizationType.Q4_1
    )
    ours = by_block(quantize(w, "int4").dequantize() - w).sum()
    assert ours < 0.9 * by_block(torch.from_numpy(plain) - w).sum()


def test_int4_values_are_rounded_with_the_stored_scale():
    w = gaussian(16, 64, seed=3)
    values, scale, minimum = unpack_blocks(quantize(w, "int4").blocks)
    assert minimum is not None
    step, start = (t.float().repeat_interleave(32, dim=1) for t in (scale, minimum))
    nearest = ((w - start) / step).round().clamp(0, 15)
    assert (values == nearest).float().mean() > 0.999  # the rest are ties, within float32 rounding


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_zero_and_constant_blocks(storage):
    w = torch.zeros(20, 64)
    w[1, :32] = 0.25
    w[2, 32:] = -7.0
    w[3, 5] = 1e-7  # float16 has no step of a fifteenth of this
    out = quantize(w, storage).dequantize()
    assert torch.equal(out[0], torch.zeros(64))
    assert torch.equal(out[4:], torch.zeros(16, 64))
    torch.testing.assert_close(out[1:3], w[1:3], rtol=6e-4, atol=0)
    assert (out[3] - w[3]).abs().max() <= 2**-24


def test_subnormal_scales_do_not_clip():
    """max / 127 is 1.4 float16 steps here: rounded down, values would stop at 127/178 of the largest."""
    w = torch.full((1, 32), 1.4 * 2**-24 * 127)
    out = quantize(w, "int8").dequantize()
    assert (out - w).abs().max() <= 2**-24


@pytest.mark.parametrize("storage", ["int4", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e8, -1e8])
def test_unholdable_values_name_the_tensor(storage, bad):
    w = gaussian(32, 64)
    w[17, 40] = bad
    with pytest.raises(ValueError, match=r"blk\.3\.ffn_up"):
        quantize(w, storage, name="blk.3.ffn_up")


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_chunks_and_rows_do_not_change_the_blocks(storage, monkeypatch):
    w = gaussian(70, 64)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    whole = quantize(w, storage)
    monkeypatch.setattr(module, "_CHUNK", 1)  # 16 rows at a time
    assert torch.equal(quantize(w, storage).blocks.q, whole.blocks.q)
    assert torch.equal(quantize(w, storage).dequantize(), whole.dequantize())
    assert torch.equal(quantize(w, storage, rows=order).dequantize(), whole.dequantize()[order])
    few = quantize(w, storage, rows=order[:5])
    assert few.shape == (5, 64)
    assert torch.equal(few.dequantize(), whole.dequantize()[order[:5]])


def test_chunks_leave_the_threads_that_begin_later_alone(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1)
    torch.set_num_threads(2)  # conftest puts it back
    quantize(gaussian(70, 64), "int4")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_quantize_takes_any_float(dtype):
    w = gaussian().to(dtype)
    assert torch.equal(quantize(w, "int4").dequantize(), quantize(w.float(), "int4").dequantize())


def test_columns_must_be_whole_blocks():
    with pytest.raises(ValueError, match=r"embed has 40 inputs.*keep it dense"):
        quantize(gaussian(16, 40), "int4", name="embed")
    kept = convert(gaussian(16, 40), torch.bfloat16, "int4", name="embed")
    assert isinstance(kept, DenseWeight)
    assert kept.tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_block_weight_multiplies_and_looks_up_what_it_dequantises_to(storage):
    weight = quantize(gaussian(40, 64), storage)
    assert isinstance(weight, BlockWeight)
    dense = weight.dequantize()
    x = gaussian(3, 64, seed=5)
    exact = x @ dense.t()
    assert (weight.linear(x) - exact).norm() / exact.norm() < 0.02  # the kernels round activations to 8 bits
    ids = torch.tensor([39, 0, 0, 17])
    assert torch.equal(weight.rows(ids, torch.float32), dense[ids])
    assert weight.rows(ids, torch.bfloat16).dtype == torch.bfloat16
    per_weight = {"int4": 0.5 + 4 / 32, "int8": 1 + 2 / 32}[storage]
    assert weight.nbytes == 48 * 64 * per_weight  # 40 rows are padded to 48
    assert torch.equal(weight.to("cpu").dequantize(), dense)


def test_dense_weight():
    w = gaussian(40, 30)
    weight = DenseWeight(w.bfloat16())
    assert weight.shape == (40, 30)
    assert weight.nbytes == 40 * 30 * 2
    assert torch.equal(weight.dequantize(), w.bfloat16().float())
    ids = torch.tensor([7, 7, 0])
    assert torch.equal(weight.rows(ids, torch.float32), w.bfloat16().float()[ids])
    x = gaussian(2, 30, seed=2)
    torch.testing.assert_close(DenseWeight(w).to("cpu").linear(x), x @ w.t(), rtol=1e-4, atol=1e-4)


def test_convert_copies_and_refuses_what_the_dtype_cannot_hold():
    w = gaussian(16, 32)
    kept = convert(w, torch.float32, None, name="w")
    before = kept.dequantize().clone()
    w.zero_()
    assert torch.equal(kept.dequantize(), before)
    w[3, 3] = 1e6
    with pytest.raises(ValueError, match=r"lm_head holds values that are not finite in torch.float16"):
        convert(w, torch.float16, "none", name="lm_head")
    w[3, 3] = float("nan")
    with pytest.raises(ValueError, match="lm_head"):
        convert(w, torch.float32, None, name="lm_head")


def test_convert_picks_rows():
    w = gaussian(16, 32)
    order = torch.arange(15, -1, -1)
    assert torch.equal(convert(w, torch.float32, None, name="w", rows=order).dequantize(), w.flip(0))
    assert np.array_equal(
        convert(w, torch.float32, "int8", name="w", rows=order).dequantize().numpy(),
        quantize(w, "int8").dequantize().flip(0).numpy(),
    )


NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
       0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]  # fmt: skip
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


@pytest.mark.parametrize(("table", "numbers", "near"), [("nf4", NF4, 0.004), ("fp4", FP4, 0), ("iq4", IQ4, 0)])
def test_codes_and_scales_of_a_table(table: str, numbers: list[float], near: float) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 96), generator=generator, dtype=torch.uint8)
    scale = 2.0 ** torch.randint(-9, 2, (40, 3), generator=generator)
    weight = table_weight(codes, scale if near else scale * 1.25, table)
    expected = torch.tensor(numbers)[codes.long()] * (scale if near else scale * 1.25).repeat_interleave(32, dim=1)
    found = weight.dequantize()
    assert ((found - expected).abs() <= near * scale.repeat_interleave(32, dim=1)).all()
    assert weight.nbytes == block_bytes((40, 96), 4, False) and weight.shape == (40, 96)
    with pytest.raises(ValueError, match=r"layer\.w holds values that are not finite"):
        table_weight(codes, scale * torch.inf, table, "layer.w")
