"""Choices by Triton: the tokens that `specdec.engine.sampling` chooses on the CPU."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from specdec.engine.sampling import gumbel, gumbel_argmax, noise_key
from specdec.kernels import reference
from tests.support.triton.here import DEVICE, best, choose

pytestmark = pytest.mark.gpu

ROWS = 24
MASK = (1 << 64) - 1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("specdec.kernels.triton.choice"), "_BLOCK", 128)


def scores(rows: int, count: int, spread: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, count, generator=generator, dtype=torch.float32) * spread


def keys_of(seeds: range) -> tuple[list[int], Tensor]:
    """Return noise keys of many seeds, and the same bits as int64."""
    keys = [noise_key(seed, 7 * seed) for seed in seeds]
    return keys, torch.tensor([key - (1 << 64) if key >> 63 else key for key in keys], dtype=torch.int64)


def key_of_bits(token: int, bits: int) -> int:
    """Return the key under which the hash of a token's id is `bits`: SplitMix64's steps, backwards."""
    value = bits
    for shift, multiplier in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        for _ in range(3):  # as often as 64 has shifts
            value = bits ^ (value >> shift)
        value = bits = value * pow(multiplier, -1, 1 << 64) & MASK
    return (value - token * 0x9E3779B97F4A7C15) & MASK


def chosen(x: Tensor, keys: Tensor | None, *options: Tensor | None) -> tuple[list[int], list[float], list[bool]]:
    """Choose on the device: the indices, the largest scores, and which rows are sure."""
    there = [None if part is None else part.to(DEVICE) for part in (x, keys, *options)]
    found = best(there[0]) if keys is None else choose(*there)
    return found.winner.tolist(), found.top.tolist(), found.sure.tolist()


@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0, 30.0])
def test_the_keyed_choice_is_the_samplers(spread: float) -> None:
    x = scores(ROWS, 300, spread, seed=1)  # the last of three blocks is not full
    keys, bits = keys_of(range(ROWS))
    found, tops, sure = chosen(x, bits)
    wanted = [gumbel_argmax(row, float(row.max()), key) for row, key in zip(x, keys, strict=True)]
    assert found == wanted
    assert len(set(wanted)) > ROWS // 2  # the noise decides
    assert all(sure)
    assert tops == x.amax(dim=1).tolist()


def test_the_noise_is_of_token_ids() -> None:
    x, ids = scores(ROWS, 140, 1.0, seed=2), torch.arange(140, dtype=torch.int64) * 1871 % 262144
    keys, bits = keys_of(range(100, 100 + ROWS))
    wanted = [gumbel_argmax(row, float(row.max()), key, ids) for row, key in zip(x, keys, strict=True)]
    assert chosen(x, bits, ids)[0] == wanted
    assert wanted != chosen(x, bits)[0]


def test_a_row_has_the_same_choice_however_many_rows_there_are() -> None:
    x, (_, bits) = scores(4, 200, 1.0, seed=3), keys_of(range(4))
    whole = chosen(x, bits)[0]
    assert [chosen(x[t : t + 1], bits[t : t + 1])[0][0] for t in range(4)] == whole


def test_only_rows_that_have_noise_are_given_it() -> None:
    x, (keys, bits) = scores(4, 200, 0.1, seed=4), keys_of(range(4))
    found, _, _ = chosen(x, bits, None, torch.tensor([True, False, True, False], dtype=torch.bool))
    wanted = [int(x[t].argmax()) if t % 2 else gumbel_argmax(x[t], float(x[t].max()), keys[t]) for t in range(4)]
    assert found == wanted


def test_the_largest_is_the_first_of_equals_and_a_nan_wins() -> None:
    x = scores(6, 260, 1.0, seed=5)
    x[0, [70, 190, 259]] = 9.0
    x[1, [30, 200]] = float("nan")
    x[2, 250] = float("inf")
    x[3] = -float("inf")
    x[4, 3], x[4, 140] = float("inf"), float("nan")
    found, tops, sure = chosen(x, None)
    for row, index, top in zip(x, found, tops, strict=True):
        value, wanted = reference.best(row)
        assert index == wanted
        assert top == value or (top != top and value != value)
    assert all(sure)


def test_a_score_far_below_wins_with_the_largest_noise() -> None:
    x = torch.zeros(1, 300, dtype=torch.float32)
    x[0, 3] = 30.0
    key = key_of_bits(200, MASK)  # 36.7
    noise = gumbel(key, torch.tensor([3, 200], dtype=torch.int64))
    assert float(noise[1]) > 36 and float(noise[0]) < 6
    bits = torch.tensor([key - (1 << 64) if key >> 63 else key], dtype=torch.int64)
    assert chosen(x, bits)[0] == [200]


def test_sums_that_float32_does_not_tell_apart_are_told_apart() -> None:
    keys, bits = keys_of(range(ROWS))
    x = torch.full((ROWS, 300), -50.0, dtype=torch.float32)
    gaps = []
    for row, key in zip(x, keys, strict=True):
        low, high = gumbel(key, torch.tensor([5, 250], dtype=torch.int64)).tolist()
        row[5], row[250] = 0.0, low - high
        gaps.append(abs(low - high - float(row[250])))
    assert 0 < max(gaps) < 1e-6
    wanted = [gumbel_argmax(row, float(row.max()), key) for row, key in zip(x, keys, strict=True)]
    assert {*wanted} == {5, 250} and chosen(x, bits)[0] == wanted


def test_rows_without_a_largest_number_get_no_noise() -> None:
    x, (_, bits) = scores(3, 150, 1.0, seed=6), keys_of(range(3))
    x[0, 140], x[1, 20], x[2] = float("nan"), float("inf"), -float("inf")
    assert chosen(x, bits)[0] == [140, 20, 0]


@pytest.mark.parametrize("other", [40, 140])  # in the same block and in another one
def test_a_choice_that_is_too_close_is_left_to_the_cpu(other: int) -> None:
    x, ids = torch.full((2, 150), -5.0, dtype=torch.float32), torch.arange(150, dtype=torch.int64)
    ids[other] = ids[20]  # the same noise: equal sums
    x[0, [20, other]] = 20.0
    x[1, 20] = 20.0
    found, _, sure = chosen(x, keys_of(range(2))[1], ids)
    assert found == [20, 20]
    assert sure == [False, True]


def test_tokens_that_are_forbidden_are_never_chosen() -> None:
    x, (keys, bits) = scores(8, 150, 0.0), keys_of(range(8))
    x[:, 5:] = -float("inf")
    found, _, _ = chosen(x, bits)
    assert found == [gumbel_argmax(row, 0.0, key) for row, key in zip(x, keys, strict=True)]
    assert max(found) < 5
