"""Norm, rotation and writing to a store by Triton: the reference's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.cache.stores import LayerStore, StoreShape
from specdec.kernels import KeyFromValue, reference
from tests.support.triton.here import DEVICE, append, norm_rope, norm_rope_append

pytestmark = pytest.mark.gpu

EPS = 1e-6
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
ROWS = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def pair_of_stores(heads: int, width: int, dtype: torch.dtype, *, alone: bool = False) -> tuple[LayerStore, LayerStore]:
    """Make two empty rings of 13 slots, or two full stores of values alone: the second is on the device."""
    table = torch.ones(256, 2, dtype=torch.float32)
    made = KeyFromValue(torch.ones(width, dtype=torch.float32), table, table)
    shape = StoreShape(heads, width, None, lambda _: made) if alone else StoreShape(heads, width, 6)
    first, second = (LayerStore(shape, 8, dtype, device) for device in (torch.device("cpu"), DEVICE))
    return first, second


def same(one: LayerStore, other: LayerStore) -> bool:
    pairs = zip(one.parts, other.parts, strict=True)
    return all(torch.allclose(mine, theirs.cpu(), rtol=0, atol=0, equal_nan=True) for mine, theirs in pairs)


def at(position: int) -> Tensor:
    return torch.tensor([position], dtype=torch.int64, device=DEVICE)


def there(*tensors: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "width"), [(2, 48), (1, 64)])
def test_rows_are_written_as_the_cache_writes_them(
    dtype: torch.dtype, rows: torch.dtype, heads: int, width: int
) -> None:
    expected, found = pair_of_stores(heads, width, dtype)
    for start, count in ((0, 3), (9, 8), (1000003, 5)):  # the second wraps around the end of the ring
        k, v = (numbers(count, heads, width, dtype=rows, seed=seed) for seed in (start, start + 1))
        expected.write(start, k, v)
        append(found.view, at(start), *there(k, v))
        assert found.values.any()
        assert same(expected, found)


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_that_are_none_and_rows_too_small_to_count(dtype: torch.dtype) -> None:
    expected, found = pair_of_stores(1, 32, dtype)
    k = numbers(6, 1, 32)
    k[0], k[1, 0, 3], k[2, 0, 1], k[3, 0, 2] = 0, float("inf"), float("nan"), float("-inf")
    k[4] = k[4] * 1e-31
    k[5] = torch.arange(32, dtype=torch.float32) - 15.5  # halves, which are rounded to even
    expected.write(2, k, k)
    append(found.view, at(2), *there(k, k))
    assert same(expected, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_store_of_values_alone_takes_no_keys(dtype: torch.dtype) -> None:
    expected, found = pair_of_stores(1, 32, dtype, alone=True)
    v = numbers(3, 1, 32)
    expected.write(7, None, v)
    append(found.view, at(7), None, *there(v))
    assert found.values[:, 7:10].any()
    assert same(expected, found)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [32, 48, 80])
def test_norm_and_rotation_are_the_reference_to_the_bit(width: int, rows: torch.dtype) -> None:
    x, weight = numbers(3, 5, width, dtype=rows), numbers(width, dtype=rows, seed=1)
    cos, sin = (numbers(3, width, dtype=rows, seed=seed) for seed in (2, 3))
    normed = reference.rope(reference.rms_norm(x, weight, EPS), cos, sin)
    plain = reference.rope(x, cos, sin)
    x, weight, cos, sin = there(x, weight, cos, sin)
    assert torch.equal(norm_rope(x, weight, EPS, cos, sin).cpu(), normed)
    assert torch.equal(norm_rope(x, None, EPS, cos, sin).cpu(), plain)
    assert torch.equal(norm_rope(x[1:2], weight, EPS, cos[1:2], sin[1:2]).cpu(), normed[1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_one_kernel_does_what_the_ops_do_one_by_one(dtype: torch.dtype, alone: bool, rows: torch.dtype) -> None:
    expected, found = pair_of_stores(2, 32, dtype, alone=alone)
    q, raw, v = (numbers(3, heads, 32, dtype=rows, seed=heads) for heads in (4, 2, 2))
    v = raw if alone else v + 1
    q_norm, k_norm = (numbers(32, dtype=rows, seed=seed) for seed in (1, 2))
    cos, sin = (numbers(3, 32, dtype=rows, seed=seed) for seed in (3, 4))
    heads, turns = there(q, raw, v, q_norm, k_norm), there(cos, sin)
    made = norm_rope_append(found.view, at(11), *heads, EPS, *turns, norm_values=True)
    assert torch.equal(made.cpu(), reference.rope(reference.rms_norm(q, q_norm, EPS), cos, sin))
    keys = reference.rope(reference.rms_norm(raw, k_norm, EPS), cos, sin)
    expected.write(11, keys, reference.rms_norm(v, None, EPS))
    assert same(expected, found)


def test_families_without_these_norms() -> None:
    expected, found = pair_of_stores(2, 32, torch.float32)
    q, k, v = (numbers(3, heads, 32, seed=heads) for heads in (3, 2, 2))
    cos, sin = numbers(3, 32, seed=3), numbers(3, 32, seed=4)
    heads, turns = there(q, k, v), there(cos, sin)
    made = norm_rope_append(found.view, at(4), *heads, None, None, EPS, *turns, norm_values=False)
    assert torch.equal(made.cpu(), reference.rope(q, cos, sin))
    expected.write(4, reference.rope(k, cos, sin), v)
    assert same(expected, found)


def test_keys_and_values_alone() -> None:
    expected, found = pair_of_stores(2, 32, torch.bfloat16)
    k, v, weight = numbers(3, 2, 32), numbers(3, 2, 32, seed=1), numbers(32, seed=2)
    cos, sin = numbers(3, 32, seed=3), numbers(3, 32, seed=4)
    heads, (norm, *turns) = there(k, v), there(weight, cos, sin)
    assert norm_rope_append(found.view, at(4), None, *heads, None, norm, EPS, *turns, norm_values=False) is None
    expected.write(4, reference.rope(reference.rms_norm(k, weight, EPS), cos, sin), v)
    assert same(expected, found)
