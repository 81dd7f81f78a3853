"""Norms, alone and with what quantises their output, to the reference's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.kernels import reference
from tests.support.triton.here import DEVICE, FLOATS, ROWS, norm, normal, quantise, same, spread

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 2, 7, 32, 100, 256, 576, 3840])
def test_rms_norm_has_the_references_bits(width: int, dtype: torch.dtype) -> None:
    x, weight = spread(7, 3, width, dtype=dtype), normal(width, dtype=dtype)
    for scale in (weight, None):
        there = None if scale is None else scale.to(DEVICE)
        assert same(norm.rms_norm(x.to(DEVICE), there, 1e-6), reference.rms_norm(x, scale, 1e-6))


def test_a_row_does_not_see_other_rows_nor_where_it_stands() -> None:
    x, weight = spread(max(ROWS), 96).to(DEVICE), normal(96).to(DEVICE)
    whole = norm.rms_norm(x, weight, 1e-6)
    for count in ROWS:
        assert torch.equal(norm.rms_norm(x[-count:], weight, 1e-6), whole[-count:]), count
    strided = normal(5, 3, 64).to(DEVICE).transpose(0, 1)
    assert torch.equal(norm.rms_norm(strided, None, 1e-6), norm.rms_norm(strided.contiguous(), None, 1e-6))
    assert norm.rms_norm(x[:0], weight, 1e-6).shape == (0, 96)


def test_what_is_not_a_number_stays_so() -> None:
    x = normal(3, 64)
    x[0, 3], x[2, 5] = torch.nan, torch.inf
    assert same(norm.rms_norm(x.to(DEVICE), None, 1e-6), reference.rms_norm(x, None, 1e-6))


def blocks_equal(found: quantise.Quantised, wanted: Tensor) -> bool:
    return all(map(torch.equal, found, quantise.quantise(wanted.to(DEVICE))))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [32, 96, 576])
def test_norm_quantise_quantises_what_rms_norm_gives(width: int, dtype: torch.dtype) -> None:
    x, weight = spread(11, width, dtype=dtype), normal(width, dtype=dtype)
    found = norm.norm_quantise(x.to(DEVICE), weight.to(DEVICE), 1e-6)
    assert blocks_equal(found, reference.rms_norm(x, weight, 1e-6))
    assert all(part.shape[0] == 0 for part in norm.norm_quantise(x[:0].to(DEVICE), None, 1e-6))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("post", [True, False])
def test_add_norm_quantise_is_its_parts_one_by_one(post: bool, dtype: torch.dtype) -> None:
    residual, x = (normal(9, 96, dtype=dtype) for _ in range(2))
    after, weight = (normal(96, dtype=dtype) for _ in range(2))
    added, found = norm.add_norm_quantise(
        residual.to(DEVICE), x.to(DEVICE), after.to(DEVICE) if post else None, weight.to(DEVICE), 1e-6
    )
    whole = residual + (reference.rms_norm(x, after, 1e-6) if post else x)
    assert same(added, whole)
    assert blocks_equal(found, reference.rms_norm(whole, weight, 1e-6))
