"""Attention over ring slots, norm, rotary embedding and gated activation, on every kernel path of
`test_kernels.py`: against float64 formulas, and bit for bit against other row counts and ring sizes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import kernels
from specdec.kernels import KVView
from tests.support.native.kernel_paths import partitions, path, threads

__all__ = ["path", "threads"]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, lo: list[int], hi: list[int], scale: float) -> Tensor:
    """float64, one row and head at a time."""
    rows, heads, _ = q.shape
    kv_heads, slots, _ = k.shape
    out = torch.zeros(rows, heads, v.shape[2], dtype=torch.float64)
    for t in range(rows):
        at = torch.tensor([p % slots for p in range(lo[t], hi[t])], dtype=torch.long)
        for h in range(heads):
            kv = h // (heads // kv_heads)
            if len(at):
                weights = torch.softmax(k[kv, at].double() @ q[t, h].double() * scale, dim=0)
                out[t, h] = weights @ v[kv, at].double()
    return out


SHAPES = [(4, 2, 8, 8), (9, 3, 64, 64), (4, 1, 32, 48), (6, 6, 20, 7), (3, 1, 256, 512)]


@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), SHAPES)
def test_attention_is_softmax_over_the_visible_slots(
    path: str, heads: int, kv_heads: int, width: int, value_width: int
) -> None:
    slots = 53
    q = torch.randn(6, heads, width)
    k, v = torch.randn(kv_heads, slots, width), torch.randn(kv_heads, slots, value_width)
    lo, hi = [0, 100, 140, 40, 7, 12], [53, 153, 141, 60, 7, 45]
    found = kernels.attention(q, KVView(k, v), lo, hi, width**-0.5)
    exact = naive_attention(q, k, v, lo, hi, width**-0.5)
    assert found.shape == (6, heads, value_width)
    assert (found.double() - exact).abs().max() < 2e-6 * max(1.0, exact.abs().max().item())
    assert not found[4].any()


@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), SHAPES)
def test_attention_bits_depend_on_nothing_but_the_row(
    path: str, threads: int, heads: int, kv_heads: int, width: int, value_width: int
) -> None:
    """Not on the rows beside it, the ring's size, where in the ring it is, or the memory's strides."""
    rows, window = 7, 45
    keys, values = torch.randn(kv_heads, 130, width), torch.randn(kv_heads, 130, value_width)
    q = torch.randn(rows + 1, heads, width)[1:]
    for base in (1, 16, 47, 64, 121):
        hi = [base + 1 + t for t in range(rows)]
        lo = [max(0, end - window) for end in hi]
        first, last = lo[0], hi[-1]
        results = []
        for slots in (last - first, 61, 130):
            k, v = torch.full((kv_heads, slots, width), 99.0), torch.full((kv_heads, slots, value_width), 99.0)
            at = torch.tensor([p % slots for p in range(first, last)])
            k[:, at], v[:, at] = keys[:, first:last], values[:, first:last]
            results.append(kernels.attention(q, KVView(k, v), lo, hi, 0.3))
        k = torch.randn(130, kv_heads, width + 3).transpose(0, 1)[..., :width]
        k.copy_(keys)
        results.append(kernels.attention(q, KVView(k, values), lo, hi, 0.3))
        for cut in partitions(rows):
            pieces = [kernels.attention(q[c], KVView(keys, values), lo[c], hi[c], 0.3) for c in cut]
            results.append(torch.cat(pieces))
        for other in results[1:]:
            assert torch.equal(other, results[0])


def test_attention_reads_other_stores_and_shows_bad_numbers(path: str) -> None:
    q, k, v = torch.randn(2, 4, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    half = kernels.attention(q.bfloat16(), KVView(k.bfloat16(), v.bfloat16()), [0, 0], [9, 9], 0.25)
    rounded = [part.bfloat16().float() for part in (q, k, v)]
    whole = kernels.attention(rounded[0], KVView(*rounded[1:]), [0, 0], [9, 9], 0.25)
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).abs().max() < 0.02
    k[0, 3, 2] = math.nan
    found = kernels.attention(q, KVView(k, v), [0, 4], [9, 9], 0.25)
    assert found[0, :2].isnan().all()
    assert not found[0, 2:].isnan().any()
    assert not found[1].isnan().any()  # the slot is there, but not visible
    v[1, 5, 0] = math.inf
    assert not kernels.attention(q, KVView(k, v), [4, 4], [9, 9], 0.25)[:, 2:, 0].isfinite().any()


def test_attention_names_the_shapes_it_wants(path: str) -> None:
    q, k = torch.randn(2, 4, 16), torch.randn(3, 9, 16)
    with pytest.raises(ValueError, match="attention wants"):
        kernels.attention(q, KVView(k, k), [0, 0], [1, 1], 1.0)
    with pytest.raises(ValueError, match="attention wants"):
        kernels.attention(q, KVView(k[:2], k[:2]), [0], [1, 1], 1.0)
    with pytest.raises(AssertionError, match="9"):
        kernels.attention(q, KVView(k[:2], k[:2]), [0, 0], [1, 10], 1.0)


@pytest.mark.parametrize("width", [1, 2, 7, 16, 31, 32, 64, 100, 576, 3840])
def test_rms_norm(path: str, width: int) -> None:
    x, weight = torch.randn(4, 3, width), torch.randn(width)
    for scale in (weight, None):
        exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
        exact = exact if scale is None else exact * scale.double()
        found = kernels.rms_norm(x, scale, 1e-6)
        assert found.shape == x.shape
        assert (found.double() - exact).abs().max() < 1e-6 * max(1.0, exact.abs().max().item())
    half = kernels.rms_norm(x.bfloat16(), weight, 1e-6)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, kernels.rms_norm(x.bfloat16().float(), weight, 1e-6).bfloat16())


@pytest.mark.parametrize("width", [2, 8, 64, 100, 256])
def test_rope(path: str, width: int) -> None:
    x, angle = torch.randn(5, 3, width), torch.randn(5, width)
    turned = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
    expected = x * angle.cos()[:, None] + turned * angle.sin()[:, None]
    assert torch.equal(kernels.rope(x, angle.cos(), angle.sin()), expected)
    with pytest.raises(ValueError, match="cos and sin"):
        kernels.rope(x, angle.cos()[:, :1], angle.sin())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(path: str, activation: str) -> None:
    gate = torch.cat((torch.randn(3, 500) * 4, torch.linspace(-200, 200, 1503).view(3, 501)), dim=1)
    up = torch.randn(3, 1001)
    wide = gate.double()
    exact = torch.nn.functional.silu(wide)
    if activation == "gelu_tanh":
        exact = torch.nn.functional.gelu(wide, approximate="tanh")
    found = kernels.gated(gate, up, activation).double()
    assert ((found - exact * up).abs() <= 1e-5 * (exact * up).abs() + 1e-6).all()
    gate[1, 7] = math.nan
    dirty = kernels.gated(gate, up, activation)
    assert dirty[1, 7].isnan()
    assert dirty.isnan().sum() == 1


def test_gated_names_the_activations_there_are(path: str) -> None:
    with pytest.raises(ValueError, match="gelu_tanh"):
        kernels.gated(torch.ones(1, 2), torch.ones(1, 2), "relu")
    with pytest.raises(ValueError, match="one shape"):
        kernels.gated(torch.ones(1, 2), torch.ones(1, 3), "silu")


@pytest.mark.parametrize("width", [24, 67, 640, 1537])
def test_row_ops_do_not_see_other_rows(path: str, threads: int, width: int) -> None:
    rows = 53  # 53 x 1537 is past the size at which torch splits an elementwise op over threads
    x, up, weight = torch.randn(rows, width) * 5, torch.randn(rows, width), torch.randn(width)
    heads = torch.randn(rows, 3, 2 * width)
    cos, sin = torch.randn(2, rows, 2 * width)
    ops = [
        lambda part: kernels.rms_norm(x[part], weight, 1e-5),
        lambda part: kernels.rms_norm(heads[part], None, 1e-5),
        lambda part: kernels.rope(heads[part], cos[part], sin[part]),
        lambda part: kernels.gated(x[part], up[part], "silu"),
        lambda part: kernels.gated(x[part], up[part], "gelu_tanh"),
    ]
    for op in ops:
        whole = op(slice(0, rows))
        for cut in partitions(rows):
            assert torch.equal(torch.cat([op(part) for part in cut]), whole)


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [H, S, D] as int8 and a scale [H, S]."""
    scale = x.abs().amax(-1) / 127
    return torch.round(x / scale[..., None]).to(torch.int8), scale


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (9, 3, 64), (6, 6, 20), (8, 1, 512)])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "values", "values bfloat16", "values int8"])
def test_attention_over_other_stores_is_attention_over_what_they_hold(
    path: str, threads: int, kind: str, heads: int, kv_heads: int, width: int
) -> None:
    """bfloat16, int8 with scales, and keys rebuilt from values: the bits of a float32 store of the same numbers."""
    rows, slots = 9, 150
    q, k, v = torch.randn(rows, heads, width), *torch.randn(2, kv_heads, slots, width)
    store: dict[str, Any] = {"keys": k, "values": v}
    if "bfloat16" in kind:
        store = {name: t.bfloat16() for name, t in store.items()}
        k, v = store["keys"].float(), store["values"].float()
    elif "int8" in kind:
        (store["keys"], store["key_scale"]), (store["values"], store["value_scale"]) = int8_rows(k), int8_rows(v)
        k, v = (store[n].float() * store[f"{n[:-1]}_scale"][..., None] for n in ("keys", "values"))
    if "values" in kind:
        pairs = width // 2 if heads == 4 else width // 4  # that turn; the others have a cosine of one and no sine
        made = kernels.KeyFromValue(torch.randn(width), torch.randn(slots, pairs), torch.randn(slots, pairs))
        cos, sin = torch.ones(slots, 2, width // 2), torch.zeros(slots, 2, width // 2)
        cos[..., :pairs], sin[..., :pairs] = made.cos[:, None], made.sin[:, None]
        store = {name: t for name, t in store.items() if not name.startswith("key")}
        store |= {"keys": None, "key_from_value": made}
        k = kernels.rope((v * made.weight).transpose(0, 1).contiguous(), cos.flatten(1), sin.flatten(1)).transpose(0, 1)
        lo, hi = [0] * rows, [slots - rows + t + 1 for t in range(rows)]
    else:  # a ring, wrapped
        lo, hi = [200 + t for t in range(rows)], [340 + t for t in range(rows)]
    found = kernels.attention(q, KVView(**store), lo, hi, 0.2)
    assert torch.equal(found, kernels.attention(q, KVView(k.contiguous(), v), lo, hi, 0.2))
    pieces = [kernels.attention(q[t : t + 1], KVView(**store), lo[t : t + 1], hi[t : t + 1], 0.2) for t in range(rows)]
    assert torch.equal(torch.cat(pieces), found)


def test_a_store_that_does_not_fit_together_is_refused() -> None:
    k, scale = torch.zeros(2, 5, 8), torch.ones(2, 5)
    for wrong in (
        {"keys": k, "values": k[:, :4]},
        {"keys": k, "values": k.bfloat16()},
        {"keys": None, "values": k},
        {"keys": k, "values": k, "key_scale": scale},
        {"keys": k.to(torch.int8), "values": k.to(torch.int8), "key_scale": scale},
    ):
        with pytest.raises(ValueError, match=r"store|attention wants"):
            KVView(**wrong)
