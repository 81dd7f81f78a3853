"""Weights that were trained for 4 bits are found, and come back; others are quantised as they always were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval.synthetic.packed.folders import bfloat16_on_lattice
from specdec.kernels import pack_blocks
from specdec.weights import SafetensorsCheckpoint, quantize
from specdec.weights.fit import fit_int4, fit_int8
from specdec.weights.formats.lattice import fit_lattice, lattice_share


def plain(rows: int = 96, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_trained_weights_come_back(storage: str) -> None:
    w = bfloat16_on_lattice(512, 2560)
    weight = quantize(w, storage)
    assert (weight.blocks.bits, weight.blocks.minimum) == (4, None)
    back = weight.dequantize()
    same = float((back.bfloat16() == w).float().mean())
    error = float((back - w.float()).square().sum() / w.float().square().sum())
    assert same >= 0.97
    assert error < 3e-6


@pytest.mark.parametrize("reach", range(1, 9))
@pytest.mark.parametrize("sign", [1, -1])
def test_every_largest_number_of_a_block(reach: int, sign: int) -> None:
    """All whole numbers up to `reach`; 8 on one side alone, as Q4_0 has it."""
    codes = torch.arange(32).remainder(2 * reach + 1) - reach
    codes[codes == 8] = 7
    w = (codes * sign * 0.01171875).bfloat16().view(1, 32)  # the step is a bfloat16 number: all products are exact
    (values, scale, minimum), resolved = fit_lattice(w.float())
    assert bool(resolved.all()) and minimum is None
    assert torch.equal(((values.float() - 8) * scale.float()).bfloat16(), w)


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_other_weights_have_the_bits_that_they_had(storage: str) -> None:
    w = plain()
    assert lattice_share(w) == 0
    fitted = (fit_int4 if storage == "int4" else fit_int8)(w.float())
    expected, made = pack_blocks(*fitted, 4 if storage == "int4" else 8), quantize(w, storage).blocks
    assert torch.equal(made.q, expected.q) and torch.equal(made.scale, expected.scale)
    assert (made.minimum is None) == (expected.minimum is None)


def test_a_matrix_that_lies_on_it_in_part() -> None:
    w = bfloat16_on_lattice(1024, 512)
    w[::40] = plain(26, 512) * 0.02
    four, eight = quantize(w, "int4").blocks, quantize(w, "int8").blocks
    assert (four.bits, four.minimum) == (4, None)  # one row in forty has the error of 4 bits
    assert eight.bits == 8  # which 8 bits do not have
    w[::3] = plain(342, 512) * 0.02
    assert quantize(w, "int4").blocks.minimum is not None


def test_blocks_on_no_lattice_are_fitted() -> None:
    x = plain().float()
    (values, scale, _), resolved = fit_lattice(x)
    assert not bool(resolved.any())
    back = ((values.float() - 8).view(-1, 32) * scale.float().view(-1, 1)).view(x.shape)
    assert float((back - x).square().sum() / x.square().sum()) < 8e-3  # Q4_0's rule: 8.5e-3


def test_zeros_and_values_that_float16_cannot_scale() -> None:
    w = bfloat16_on_lattice(64, 256)
    w[3] = 0
    assert bool((quantize(w, "int4").dequantize()[3] == 0).all())
    tiny = quantize(torch.full((64, 32), 3e-7), "int8")  # a step below what float16 holds
    assert tiny.blocks.bits == 8
    for bad in (float("inf"), float("nan"), 1e7):
        w[5, 7] = bad
        with pytest.raises(ValueError, match="not finite, or too large"):
            quantize(w, "int4")


def test_the_plan_counts_it(tmp_path: Path) -> None:
    tensors = {"trained": bfloat16_on_lattice(128, 256), "plain": plain(), "odd": plain(32, 40)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for name in tensors:
        for storage in ("int4", "int8", "none", None):
            loaded = checkpoint.weight(name, torch.float32, storage)
            assert loaded.nbytes == checkpoint.loaded_bytes(name, torch.float32, storage)
