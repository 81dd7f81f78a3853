"""Every kernel path (the torch reference, and each native instruction set this machine has) against plain
float64 formulas and against itself: a row's bits must not depend on the rows beside it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specdec import kernels
from specdec.kernels import KVView, reference
from tests.support.native.kernel_paths import (
    KINDS,
    PLAIN,
    Kind,
    both_factors,
    dequantised,
    integers,
    packed,
    partitions,
    parts,
    path,
    threads,
)

__all__ = ["path", "threads"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 64), (37, 96)])
def test_packing_is_undone(rows: int, columns: int, kind: Kind) -> None:
    values, scale, low, sub = parts(rows, columns, kind)
    w = kernels.pack_blocks(values, scale, low, kind.bits, table=kind.table, sub=sub)
    again, scale_again, low_again = kernels.unpack_blocks(w)
    assert torch.equal(again.to(values.dtype), values)
    assert torch.equal(scale_again, scale)
    for mine, whole in ((low_again, low), (kernels.unpack_sub(w), sub)):
        assert mine is whole is None or (mine is not None and whole is not None and torch.equal(mine, whole))
    halves = 1 + kind.minimum + kind.sub  # float16 numbers, or as many bytes, of a block
    assert w.nbytes == w.q.shape[0] * 16 * columns * kind.bits // 8 + halves * w.scale.nbytes


def test_the_bytes_are_where_the_layout_says() -> None:
    values, scale, *_ = parts(20, 64, Kind(4))
    w = kernels.pack_blocks(values, scale, None, 4)
    for g, b, j, r, i in [(0, 0, 0, 0, 0), (0, 1, 3, 15, 2), (1, 1, 2, 3, 1)]:
        byte, row = int(w.q[g, b, j, r, i]), 16 * g + r
        assert byte & 15 == values[row, 32 * b + 4 * j + i]
        assert byte >> 4 == values[row, 32 * b + 16 + 4 * j + i]
        assert w.scale[g, b, r] == scale[row, b]
    assert not w.scale[1, :, 4:].any()
    values, scale, *_ = parts(20, 64, Kind(5))
    w = kernels.pack_blocks(values, scale, None, 5)
    for g, b, j, r, i in [(0, 0, 0, 0, 0), (0, 1, 3, 15, 2), (1, 1, 2, 3, 1)]:
        byte, fifth, row = int(w.q[g, b, j, r, i]), w.q[g, b, 4].flatten().tolist(), 16 * g + r
        for nibble, chunk in ((byte & 15, j), (byte >> 4, 4 + j)):
            mask = int.from_bytes(bytes(fifth[8 * chunk : 8 * chunk + 8]), "little")
            assert nibble + 16 * (mask >> 4 * r + i & 1) == values[row, 32 * b + 4 * chunk + i]
    values, scale, *_ = parts(20, 64, Kind(8))
    w = kernels.pack_blocks(values, scale, None, 8)
    assert int(w.q[1, 1, 6, 3, 2]) - 128 == values[19, 32 + 24 + 2]
    values, scale, _, factors = parts(20, 64, Kind(3, sub=True))
    w = kernels.pack_blocks(values, scale, None, 3, sub=factors)
    for g, b, h, k, r, i in [(0, 0, 0, 0, 0, 0), (0, 1, 1, 3, 15, 2), (1, 1, 0, 2, 3, 1)]:
        two, third, row = int(w.q[g, b, h, r, i]) >> 2 * k & 3, w.q[g, b, 2].flatten().tolist(), 16 * g + r
        mask = int.from_bytes(bytes(third[8 * (4 * h + k) : 8 * (4 * h + k) + 8]), "little")
        assert two + 4 * (mask >> 4 * r + i & 1) == values[row, 32 * b + 16 * h + 4 * k + i]
        assert int(w.sub[g, b, r, h]) == int(factors[row, 2 * b + h]) % 256
    values, scale, _, factors = parts(20, 64, Kind(6, sub=True))
    w = kernels.pack_blocks(values, scale, None, 6, sub=factors)
    low, high = int(w.q[1, 1, 2, 3, 1]) & 15, int(w.q[1, 1, 4, 3, 1]) >> 4 & 3
    assert low + 16 * high == values[19, 32 + 4 * 2 + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, m: (v[:, :40], s, m, 4), "multiple of 32"),
        (lambda v, s, m: (v.float(), s, m, 4), "integers"),
        (lambda v, s, m: (v + 1, s, m, 4), "0..15"),
        (lambda v, s, m: (v, s[:, :1], m, 4), "scale must be"),
        (lambda v, s, m: (v, s.float() * 1e9, m, 4), "float16"),
        (lambda v, s, m: (v + 17, s, m, 5), "0..31"),
        (lambda v, s, m: (v, s, m, 6), "4, 5 or 8 bits"),
        (lambda v, s, m: (v, s, m, 7), "4, 5 or 8 bits"),
        (lambda v, s, m: (v, s, m, 8), "no minimum"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    values, scale, minimum, _ = parts(32, 64, Kind(4, True))
    values[0, 0] = 15
    with pytest.raises(ValueError, match=message):
        kernels.pack_blocks(*change(values, scale, minimum))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_block_rows_are_the_dequantised_rows(path: str, kind: Kind) -> None:
    w = packed(37, 96, kind)
    ids = torch.tensor([36, 0, 17, 17, 5])
    assert torch.equal(kernels.block_rows(ids, w, torch.float32), dequantised(w)[ids].float())
    half = kernels.block_rows(ids, w, torch.bfloat16)
    assert torch.equal(half, kernels.block_rows(ids, w, torch.float32).bfloat16())
    assert kernels.block_rows(ids[:0], w, torch.float32).shape == (0, 96)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_block_linear_is_the_documented_arithmetic_to_the_bit(path: str, kind: Kind) -> None:
    w, f = packed(5, 96, kind), np.float32
    x = torch.randn(2, 96)
    x[1, 32:64] = 0
    _, scale, low = (None if p is None else p.numpy() for p in kernels.unpack_blocks(w))
    assert scale is not None
    raw, (of_scale, of_minimum) = integers(w).numpy(), (factor.numpy() for factor in both_factors(w))
    expected = np.zeros((2, 5), dtype=f)
    for t in range(2):
        for n in range(5):
            for b in range(3):
                part = x[t, 32 * b : 32 * b + 32].numpy()
                top = np.abs(part).max()
                s = f(top / f(127)) if top >= f(1e-30) else f(0)
                a = np.rint(part * f(f(127) / top)).astype(np.int64) if s else np.zeros(32, dtype=np.int64)
                columns, halves = slice(32 * b, 32 * b + 32), slice(2 * b, 2 * b + 2)
                dots, sums = ((part.reshape(2, 16)).sum(1) for part in (raw[n, columns] * a, a))
                dot, total = f(int((of_scale[n, halves] * dots).sum())), f(int((of_minimum[n, halves] * sums).sum()))
                term = f(f(s * f(f(scale[n, b]) * f(w.unit))) * dot)
                if low is not None:
                    term = f(term + f(f(low[n, b]) * f(s * total)))
                expected[t, n] = f(expected[t, n] + term)
    assert torch.equal(kernels.block_linear(x, w), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_block_linear_is_close_to_the_dequantised_product(path: str, kind: Kind) -> None:
    w = packed(200, 576, kind)
    x = torch.randn(9, 576)
    exact = x.double() @ dequantised(w).T
    error = (kernels.block_linear(x, w).double() - exact).norm() / exact.norm()
    assert 1e-4 < error < 8e-3  # rounding activations to 8 bits per block of 32
    half = kernels.block_linear(x.bfloat16(), w)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, kernels.block_linear(x.bfloat16().float(), w).bfloat16())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_block_linear_rows_do_not_see_each_other(path: str, threads: int, kind: Kind) -> None:
    wide = 1500 if kind in PLAIN else 100
    for rows, (n, k) in ((33, (77, 64)), (17, (wide, 320))):
        w = packed(n, k, kind)
        x = torch.randn(rows, k) * torch.logspace(-6, 4, rows)[:, None]
        whole = kernels.block_linear(x, w)
        for cut in partitions(rows):
            assert torch.equal(torch.cat([kernels.block_linear(x[part], w) for part in cut]), whole)
    assert kernels.block_linear(x[:0], w).shape == (0, wide)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_block_linear_does_not_hide_what_is_not_a_number(path: str, bad: float, kind: Kind) -> None:
    w = packed(20, 96, kind)
    x = torch.randn(3, 96)
    clean = kernels.block_linear(x, w)
    x[1, 40] = bad
    dirty = kernels.block_linear(x, w)
    assert dirty[1].isnan().all()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


def test_block_linear_names_the_shape_it_wants() -> None:
    with pytest.raises(ValueError, match=r"\[T, 64\]"):
        kernels.block_linear(torch.randn(1, 32), packed(16, 64, Kind(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(50, 7), (65, 33), (256, 64), (300, 577)])
def test_dense_linear(threads: int, dtype: torch.dtype, n: int, k: int) -> None:
    x, w, bias = torch.randn(19, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    whole = kernels.dense_linear(x, w, bias)
    exact = x.double() @ w.double().T + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (whole.double() - exact).norm() < tolerance * exact.norm()
    for cut in partitions(19):
        assert torch.equal(torch.cat([kernels.dense_linear(x[part], w, bias) for part in cut]), whole)


def test_gradients_pass_through_the_seam(path: str) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    w, weight = torch.randn(8, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = kernels.gated(kernels.dense_linear(kernels.rms_norm(x, weight, 1e-6), w), x, "gelu_tanh")
    y.square().sum().backward()
    for leaf in (x, w, weight):
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0


def test_other_devices_path_is_the_same_formula() -> None:
    """What runs where there is a GPU: one plain product over dequantised slices, and one masked attention."""
    x = torch.randn(5, 96)
    for kind in KINDS:
        w = packed(70, 96, kind)
        exact = x.double() @ dequantised(w).T
        assert (reference.expanded_linear(x, w).double() - exact).norm() < 1e-5 * exact.norm()
    q, k, v = torch.randn(4, 6, 16), torch.randn(2, 11, 16), torch.randn(2, 11, 24)
    lo, hi = [0, 8, 20, 5], [11, 17, 21, 5]
    found = reference._masked_attention(q, KVView(k, v), lo, hi, 0.25)
    torch.testing.assert_close(found, reference.attention(q, KVView(k, v), lo, hi, 0.25), rtol=1e-5, atol=1e-6)
    assert not found[3].any()
