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
                bits = rest.to(tl.int32, bitcast=True)  # as in near_bfloat16: calls cost the interpreter time
                part = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
            else:
                part = rest.to(PART)
            parts += (part,)
            if i + 1 < COUNT:
                rest = rest - part.to(tl.float32)
    return parts


@triton.jit
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
