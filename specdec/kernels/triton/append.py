"""Norm and rotate the heads of queries and keys, and write keys and values into a store: one kernel for any of it.

A head of a row is a program. The arithmetic is the reference's to the bit, with a rounding to the rows' dtype after the
norm and after the rotation, as op by op. Positions come from the device, so that a captured pass can be replayed
further on in a text.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.reference import TINY
from specdec.kernels.store import KVView
from specdec.kernels.triton.launch import jit, launch, rounded
from specdec.kernels.triton.norm import squares


def append(store: KVView, start: Tensor, k: Tensor | None, v: Tensor) -> None:
    """Write keys k [T, Hkv, D] and values v [T, Hkv, Dv] of positions start .. start + T - 1 into their slots.

    `start`: an integer [1] on the device. `k` is None, or is not looked at, where the store makes keys from values.
    Rows are rounded as `LayerStore.write` rounds them; T is at most the number of slots.
    """
    _launch(store, start, None, k, v, None, None, 0.0, None, None, norm_values=False)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm the heads of x [T, H, D] with `weight` [D], and rotate them by cos and sin [T, D] -> [T, H, D].

    `weight` is None in a family without this norm: heads are rotated alone.
    """
    turned: Tensor = _launch(None, None, x, None, None, weight, None, eps, cos, sin, norm_values=False)
    return turned


def norm_rope_append(
    store: KVView, start: Tensor, q: Tensor | None, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    eps: float, cos: Tensor, sin: Tensor, *, norm_values: bool,
) -> Any:  # fmt: skip
    """Return `norm_rope` of q [T, Hq, D], and `append` that of k and v [T, Hkv, D], all in one kernel.

    `q` is None where only keys and values are wanted: then None is returned. `norm_values`: v is normed too, without a
    weight. `k` and `v` are one tensor where a layer has one projection for both.
    """
    return _launch(store, start, q, k, v, q_norm, k_norm, eps, cos, sin, norm_values=norm_values)


def _launch(
    store: KVView | None, start: Tensor | None, q: Tensor | None, k: Tensor | None, v: Tensor | None,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None,
    *, norm_values: bool,
) -> Any:  # fmt: skip
    """Run the kernel on the heads that there are of q, k and v; return q."""
    if store is None or store.keys is None:
        k = None
    present = [x for x in (q, k, v) if x is not None]
    q, k, v, cos, sin = (None if x is None else x.contiguous() for x in (q, k, v, cos, sin))
    out = None if q is None else torch.empty_like(q)
    counts = [0 if x is None else x.shape[1] for x in (q, k, v)]
    keys, values, key_scale, value_scale = (None,) * 4 if store is None else store.tensors()
    strides = [n for x in (keys, values) for n in ((0, 0) if x is None else x.stride()[:2])]
    rows, _, width = present[0].shape
    width_v = width if v is None else v.shape[2]
    launch(
        _heads, (rows, sum(counts)),
        q, k, v, out, keys, values, key_scale, value_scale, q_norm, k_norm, cos, sin, start, eps,
        0 if store is None else store.slots, *counts, width, width_v, *strides,
        NORM_V=norm_values, P=1 << (max(width, width_v) - 1).bit_length(), TINY=TINY, num_warps=1,
    )  # fmt: skip
    return out


@jit
def _changed(x, weight, cos, sin, eps, width, NORM: tl.constexpr, P: tl.constexpr):
    """Read a head x [width], normed and rotated as there are a norm, a weight and cos -> float32 [P]."""
    column = tl.arange(0, P)
    there = column < width
    head = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
    if NORM:
        one = tl.full([1], 1.0, tl.float32)
        over = tl.div_rn(one, tl.sqrt_rn(tl.div_rn(squares(head, 1, P), one * width) + eps))
        head = head * over
        if weight is not None:
            head = head * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
        head = rounded(head, x.dtype.element_ty).to(tl.float32)
    if cos is not None:
        first = column < width // 2
        partner = tl.where(first, column + width // 2, column - width // 2)
        other = tl.load(x + partner, mask=there, other=0.0).to(tl.float32)
        if NORM:
            other = other * over
            if weight is not None:
                other = other * tl.load(weight + partner, mask=there, other=0.0).to(tl.float32)
            other = rounded(other, x.dtype.element_ty).to(tl.float32)
        c = tl.load(cos + column, mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin + column, mask=there, other=0.0).to(tl.float32)
        head = head * c + tl.where(first, -other, other) * s
        head = rounded(head, x.dtype.element_ty).to(tl.float32)
    return head


@jit
def _write(head, store, scale, at, scale_at, width, P: tl.constexpr, TINY: tl.constexpr):
    """Write a head float32 [P] into a slot; an int8 store gets its scale too, as `quantise_store` makes it."""
    column = tl.arange(0, P)
    if scale is not None:
        size = tl.abs(head)
        largest = tl.max(size, axis=0)
        finite = tl.max((size < float("inf")).to(tl.int32) ^ 1, axis=0) == 0  # of no NaN either
        usable = finite & (largest >= TINY)
        top = tl.full([1], 127.0, tl.float32)
        divisor = tl.zeros([1], tl.float32) + tl.where(usable, largest, 1.0)
        # adding and taking away 1.5 * 2^23 rounds to an integer, half to even
        whole = (tl.where(usable, head, 0.0) * tl.div_rn(top, divisor) + 12582912.0) - 12582912.0
        tl.store(store + at + column, whole.to(tl.int8), mask=column < width)
        step = tl.where(usable, tl.div_rn(divisor, top), tl.where(finite, 0.0, float("nan")))
        tl.store(scale + scale_at + tl.arange(0, 1), step)
    else:
        tl.store(store + at + column, rounded(head, store.dtype.element_ty), mask=column < width)


@jit
def _heads(
    q, k, v, out, keys, values, key_scale, value_scale, q_norm, k_norm, cos, sin, start, eps,
    slots, heads, key_heads, value_heads, width, width_v, key_head, key_slot, value_head, value_slot,
    NORM_V: tl.constexpr, P: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """Do all that is to be done with one head of q, k or v of one row."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if cos is not None:
        cos += row * width
        sin += row * width
    # one condition is known when the kernel is compiled, the other is not: the two do not go into one
    if start is not None:
        slot = ((tl.load(start).to(tl.int64) + row) % slots).to(tl.int64)
    if q is not None:  # noqa: SIM102
        if head < heads:
            at = (row * heads + head) * width
            column = tl.arange(0, P)
            turned = _changed(q + at, q_norm, cos, sin, eps, width, q_norm is not None, P)
            tl.store(out + at + column, rounded(turned, out.dtype.element_ty), mask=column < width)
    if k is not None:  # noqa: SIM102
        if (head >= heads) & (head < heads + key_heads):
            number = (head - heads).to(tl.int64)
            key = _changed(k + (row * key_heads + number) * width, k_norm, cos, sin, eps, width, k_norm is not None, P)
            at_key = number * key_head + slot * key_slot
            _write(key, keys, key_scale, at_key, number * slots + slot, width, P, TINY)
    if v is not None:  # noqa: SIM102
        if head >= heads + key_heads:
            nth = (head - heads - key_heads).to(tl.int64)
            value = _changed(v + (row * value_heads + nth) * width_v, None, None, None, eps, width_v, NORM_V, P)
            at_value = nth * value_head + slot * value_slot
            _write(value, values, value_scale, at_value, nth * slots + slot, width_v, P, TINY)
