"""Attention by Triton: the reference's result within its rounding, and the same bits whoever else is there."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from specdec.kernels import KeyFromValue, KVView, quantise_store, reference
from tests.support.triton.here import DEVICE, attention, moved

pytestmark = pytest.mark.gpu

SCALE = 0.3
module = import_module("specdec.kernels.triton.attention")
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let texts of some hundred positions have several chunks and spans."""
    monkeypatch.setattr(module, "CHUNK", 32)
    monkeypatch.setattr(module, "SPAN", 64)
    monkeypatch.setattr(module, "_tile", lambda kv: 16)


def store(
    heads: int, slots: int, width: int, dtype: torch.dtype, *, alone: bool = False, value_width: int | None = None
) -> KVView:
    """Make a full store; `alone`: of values, from which keys are made."""
    generator = torch.Generator().manual_seed(slots + width)

    def part(columns: int) -> tuple[Tensor, Tensor | None]:
        x = torch.randn(heads, slots, columns, generator=generator, dtype=torch.float32)
        return quantise_store(x) if dtype is torch.int8 else (x.to(dtype), None)

    values, value_scale = part(value_width or width)
    if alone:
        angles = torch.rand(slots, width // 4, generator=generator, dtype=torch.float32) * 6
        weight = torch.rand(width, generator=generator, dtype=torch.float32) + 0.5
        return KVView(None, values, None, value_scale, KeyFromValue(weight, angles.cos(), angles.sin()))
    keys, key_scale = part(width)
    return KVView(keys, values, key_scale, value_scale)


def queries(rows: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * heads)
    return torch.randn(rows, heads, width, generator=generator, dtype=torch.float32).to(dtype)


def attend(q: Tensor, kv: KVView, first: list[int], end: list[int]) -> Tensor:
    bounds = (torch.tensor(bound, dtype=torch.int32, device=DEVICE) for bound in (first, end))
    return attention(q.to(DEVICE), moved(kv), *bounds, SCALE).cpu()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("alone", [False, True])
def test_it_is_the_reference_within_rounding(dtype: torch.dtype, alone: bool) -> None:
    kv = store(2, 100, 32, dtype, alone=alone)
    q, first, end = queries(3, 4, 32), [0, 3, 70], [100, 99, 71]
    expected = reference.attention(q, kv, first, end, SCALE)
    exact = 1e-6 if dtype is torch.float32 else 1e-5  # of 24 bits, of 16
    torch.testing.assert_close(attend(q, kv, first, end), expected, rtol=exact, atol=exact)


@pytest.mark.parametrize(("width", "value_width", "group"), [(16, 16, 1), (48, 48, 3), (80, 32, 9), (24, 72, 2)])
def test_heads_of_any_width_and_groups_of_any_size(width: int, value_width: int, group: int) -> None:
    kv = store(2, 40, width, torch.bfloat16, value_width=value_width)
    q = queries(2, 2 * group, width)
    expected = reference.attention(q, kv, [0, 0], [39, 40], SCALE)
    torch.testing.assert_close(attend(q, kv, [0, 0], [39, 40]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alone", [False, True])
def test_wide_heads_go_in_pieces(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 16)
    kv, q = store(1, 40, 96, torch.bfloat16, alone=alone), queries(2, 2, 96)  # of three pieces one and a half rotate
    expected = reference.attention(q, kv, [0, 0], [39, 40], SCALE)
    torch.testing.assert_close(attend(q, kv, [0, 0], [39, 40]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_half_the_bits_give_the_same_rounded(dtype: torch.dtype) -> None:
    kv, q = store(1, 40, 32, torch.bfloat16), queries(2, 2, 32, dtype)
    wide = attend(q.float(), kv, [0, 0], [39, 40])
    found = attend(q, kv, [0, 0], [39, 40])
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), wide, rtol=2**-8, atol=1e-5)


def test_a_row_that_sees_nothing_is_zero_and_changes_no_other() -> None:
    kv, q = store(2, 40, 32, torch.bfloat16), queries(4, 4, 32)
    found = attend(q, kv, [0, 5, 9, 0], [40, 5, 3, 0])
    assert not found[1:].any()
    assert torch.equal(found[:1], attend(q[:1], kv, [0], [40]))
    assert not attend(q, kv, [7] * 4, [7] * 4).any()


@pytest.mark.parametrize(
    ("dtype", "alone", "heads"),
    [(torch.bfloat16, False, 2), (torch.bfloat16, True, 3), (torch.int8, False, 3), (torch.float32, False, 1)],
)
def test_a_row_has_the_same_bits_however_many_rows_there_are(dtype: torch.dtype, alone: bool, heads: int) -> None:
    rows, kv = 17, store(1, 100, 32, dtype, alone=alone)
    q = queries(rows, heads, 32)
    first = [0] * rows if alone else [80 + t - 49 for t in range(rows)]
    end = [80 + t for t in range(rows)]
    whole = attend(q, kv, first, end)
    for count, start in ((1, 0), (1, 16), (2, 4), (5, 11), (8, 3)):
        rest = slice(start, start + count)
        assert torch.equal(attend(q[rest], kv, first[rest], end[rest]), whole[rest])


@pytest.mark.parametrize("dtype", TYPES)
def test_chunk_by_chunk_and_span_by_span_are_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kv, q = store(1, 150, 32, dtype), queries(5, 2, 32)
    first, end = [0, 40, 100, 63, 64], [150, 130, 101, 65, 64]
    found = []
    for programs in (0, 1 << 30):  # spans, chunks
        monkeypatch.setattr(module, "_PROGRAMS", programs)
        found.append(attend(q, kv, first, end))
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_ring_that_wraps_has_the_bits_of_a_store_that_does_not(dtype: torch.dtype) -> None:
    full, slots = store(2, 240, 32, dtype), 75
    first, end = [170, 171], [238, 240]
    ring = [None if part is None else torch.zeros_like(part[:, :slots]) for part in full.tensors()]
    for position in range(240 - slots, 240):
        for part, of in zip(ring, full.tensors(), strict=True):
            if part is not None and of is not None:
                part[:, position % slots] = of[:, position]
    keys, values, key_scale, value_scale = ring
    assert values is not None
    q = queries(2, 4, 32)
    found = attend(q, KVView(keys, values, key_scale, value_scale), first, end)
    assert torch.equal(found, attend(q, full, first, end))


def test_each_row_has_room_for_as_many_units_as_it_sees() -> None:
    kv, q = store(1, 130, 32, torch.float32), queries(3, 2, 32)  # a ring; six units of 32, the first and last in part
    first, end = [127] * 3, [257, 256, 255]
    expected = reference.attention(q, kv, first, end, SCALE)
    torch.testing.assert_close(attend(q, kv, first, end), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "alone"), [(torch.bfloat16, False), (torch.int8, False), (torch.bfloat16, True)])
def test_what_no_row_sees_changes_nothing(dtype: torch.dtype, alone: bool) -> None:
    kv, q = store(2, 90, 32, dtype, alone=alone), queries(2, 4, 32)
    before = attend(q, kv, [20, 21], [59, 60])
    for part in kv.tensors():
        if part is not None:
            part[:, :20], part[:, 60:] = (5, -7) if part.dtype is torch.int8 else (float("nan"), float("inf"))
    assert torch.equal(attend(q, kv, [20, 21], [59, 60]), before)


def test_a_store_that_has_grown_gives_the_same_bits() -> None:
    small, q = store(2, 70, 32, torch.bfloat16), queries(2, 4, 32)
    assert small.keys is not None
    keys, values = (torch.nn.functional.pad(part, (0, 0, 0, 330)) for part in (small.keys, small.values))
    assert torch.equal(attend(q, KVView(keys, values), [0, 0], [69, 70]), attend(q, small, [0, 0], [69, 70]))


def test_bounds_and_heads_that_do_not_lie_in_one_piece() -> None:
    kv, q = store(2, 40, 32, torch.bfloat16), queries(2, 4, 64).to(DEVICE)[:, :, ::2]
    bounds = torch.tensor([[0, 39], [1, 40]], dtype=torch.int64, device=DEVICE)
    found = attention(q, moved(kv), bounds[:, 0], bounds[:, 1], SCALE)
    assert torch.equal(found.cpu(), attend(q.contiguous(), kv, [0, 1], [39, 40]))
