"""Products of packed and of plain matrices: the reference's bits, for every number of rows, and rows that do not see
each other."""

from __future__ import annotations

import math

import pytest
import torch

from specdec.kernels import reference
from tests.support.native.kernel_paths import Kind
from tests.support.triton.here import DEVICE, FLOATS, READ, ROWS, blocks, normal, product, quantise, rows, same, spread

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", READ, ids=str)
def test_block_linear_has_the_references_bits_for_every_number_of_rows(kind: Kind) -> None:
    w, there = blocks(37, 96, kind)
    x = spread(max(ROWS), 96)
    x[3, 32:64] = 0
    x[4, :32] = 1e-33
    whole = reference.block_linear(x, w)
    for count in ROWS:
        assert same(product.block_linear(x[:count].to(DEVICE), there), whole[:count]), count
        assert same(product.block_linear(x[-count:].to(DEVICE), there), whole[-count:]), count


@pytest.mark.parametrize("kind", READ, ids=str)
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_block_linear_for_every_step_along_the_columns(kind: Kind, columns: int) -> None:
    w, there = blocks(16, columns, kind)
    for dtype in FLOATS:
        x = normal(3, columns, dtype=dtype)
        assert same(product.block_linear(x.to(DEVICE), there), reference.block_linear(x, w)), dtype
    assert product.block_linear(x[:0].to(DEVICE), there).shape == (0, 16)


def test_block_linear_of_more_outputs_than_a_tile_holds() -> None:
    w, there = blocks(150, 64, Kind(5, True))
    for count in (1, 9, 70):
        x = spread(count, 64)
        assert same(product.block_linear(x.to(DEVICE), there), reference.block_linear(x, w)), count


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", READ, ids=str)
def test_block_linear_does_not_hide_what_is_not_a_number(kind: Kind, bad: float) -> None:
    w, there = blocks(20, 96, kind)
    x = normal(3, 96)
    x[1, 40] = bad
    found = product.block_linear(x.to(DEVICE), there)
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()
    assert same(found, reference.block_linear(x, w))


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantised_activations_are_the_references(dtype: torch.dtype) -> None:
    x = spread(33, 96, dtype=dtype)
    x[2, :32], x[5, 7], x[6, 40] = 0, math.nan, math.inf
    x[7, :32] = torch.arange(32, dtype=torch.float32) - 15.5  # halves: rounded to even
    values, scale, sums = reference.quantise_rows(x.float())
    found = quantise.quantise(x.to(DEVICE))
    assert torch.equal(found.values.cpu(), values.reshape(33, 96).to(torch.int8))
    assert same(found.scale, scale)
    assert torch.equal(found.sums.cpu(), sums.int())


@pytest.mark.parametrize("activation", product.ACTIVATIONS)
@pytest.mark.parametrize("kind", [Kind(4), Kind(5, True), Kind(8)], ids=str)
def test_gated_product_has_the_bits_of_two_products_and_an_activation(kind: Kind, activation: str) -> None:
    (_, gate), (_, up) = blocks(40, 64, kind), blocks(40, 64, kind)
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, 9, 33):
            x = normal(count, 64).to(DEVICE, dtype)
            apart = rows.gated(product.block_linear(x, gate), product.block_linear(x, up), activation)
            assert torch.equal(product.gated_product(quantise.quantise(x), gate, up, activation, dtype), apart)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k"), [(50, 7), (65, 33), (70, 64), (130, 100)])
def test_dense_linear(dtype: torch.dtype, n: int, k: int) -> None:
    x, w, bias = normal(35, k, dtype=dtype), normal(n, k, dtype=dtype), normal(n, dtype=dtype)
    here = [part.to(DEVICE) for part in (x, w, bias)]
    whole = product.dense_linear(*here)
    exact = x.double() @ w.double().T + bias.double()
    assert whole.dtype is dtype
    assert (whole.cpu().double() - exact).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()
    for part in (slice(0, 1), slice(3, 4), slice(31, 35), slice(5, 22), slice(1, 35)):
        assert torch.equal(product.dense_linear(here[0][part], *here[1:]), whole[part]), part
    assert torch.equal(product.dense_linear(*here[:2]) + here[2], whole)
