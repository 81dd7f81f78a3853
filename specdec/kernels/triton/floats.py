"""Round float32 numbers to narrower types as torch does, and cut them into parts that matrix units multiply exactly."""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.triton.launch import INTERPRETED

PART = tl.float32 if INTERPRETED else tl.bfloat16
"""The type of a part in a product: the interpreter multiplies bfloat16 as if its bits were integers."""


@triton.jit
def near_bfloat16(x):
    """Round x float32 to the nearest numbers of bfloat16, half to even, and leave them float32.

    By its bits, because the interpreter cuts a number off where the device rounds.
    """
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, near, x)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """Round x float32 to a float type, as torch does."""
    if TYPE.is_bf16():
        x = near_bfloat16(x)
    return x.to(TYPE)


@triton.jit
def near_part(x, PART: tl.constexpr):
    """Return the part of x float32 that is largest, as numbers of bfloat16 in the type PART."""
    if PART.is_fp32():
        return near_bfloat16(x)
    else:
        return x.to(PART)


@triton.jit
def add_product(total, a, b, A: tl.constexpr, B: tl.constexpr, PART: tl.constexpr):
    """Add a [M, K] times b [K, N] to total float32 [M, N], with a in A parts and b in B parts of bfloat16.

    Of one part is what is exact in bfloat16, whatever its type. Two parts hold 16 bits of a number, three all 24; what
    two parts give that are both small is left out. So matrix units make products as good as float32's.
    """
    if A == 1:
        a0 = a.to(PART)
    else:
        a0 = near_part(a, PART)
        rest = a - a0.to(tl.float32)
        a1 = near_part(rest, PART)
        a2 = near_part(rest - a1.to(tl.float32), PART)
    if B == 1:
        b0 = b.to(PART)
    else:
        b0 = near_part(b, PART)
        rest = b - b0.to(tl.float32)
        b1 = near_part(rest, PART)
        b2 = near_part(rest - b1.to(tl.float32), PART)
    if A == 3:
        total = tl.dot(a2, b0, total, input_precision="ieee")
    if B == 3:
        total = tl.dot(a0, b2, total, input_precision="ieee")
        if A > 1:
            total = tl.dot(a1, b1, total, input_precision="ieee")
    if A > 1:
        total = tl.dot(a1, b0, total, input_precision="ieee")
    if B > 1:
        total = tl.dot(a0, b1, total, input_precision="ieee")
    return tl.dot(a0, b0, total, input_precision="ieee")
