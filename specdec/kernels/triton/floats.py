"""Multiply matrices of float32 on matrix units, in parts of bfloat16 whose products are exact."""

from __future__ import annotations

import triton.language as tl

from specdec.kernels.triton.launch import INTERPRETED, jit

PART = tl.float32 if INTERPRETED else tl.bfloat16
"""The type of a part in a product: the interpreter multiplies bfloat16 as if its bits were integers."""


@jit
def _parts(x, COUNT: tl.constexpr, PART: tl.constexpr):
    """Cut x into COUNT parts of bfloat16 in the type PART, the largest first, and nothing for those it does not have.

    Of one part is what is exact in bfloat16, whatever its type. Two parts hold 16 bits of a number, three all 24.
    """
    parts = ()
    if COUNT == 1:
        parts += (x.to(PART),)
    else:
        rest = x.to(tl.float32)
        for i in tl.static_range(COUNT):
            if PART.is_fp32():
                bits = rest.to(tl.int32, bitcast=True)  # as `rounded`, without a call, which takes time here
                part = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
            else:
                part = rest.to(PART)
            parts += (part,)
            if i + 1 < COUNT:
                rest = rest - part.to(tl.float32)
    return parts


@jit
def add_product(total, a, b, A: tl.constexpr, B: tl.constexpr, PART: tl.constexpr):
    """Add a [M, K] times b [K, N] to total float32 [M, N], with a in A parts and b in B parts.

    What is left out is what parts give that are small both. So matrix units make products as good as float32's.
    """
    of_a, of_b = _parts(a, A, PART), _parts(b, B, PART)
    for small in tl.static_range(A + B - 1):  # small products first: parts i and j, i + j = A + B - 2 - small
        for i in tl.static_range(A):
            if (A + B - 2 - small < max(A, B)) and (A + B - 2 - small - i >= 0) and (A + B - 2 - small - i < B):
                total = tl.dot(of_a[i], of_b[A + B - 2 - small - i], total, input_precision="ieee")
    return total
