"""Make kernels of functions that Triton compiles, and launch them.

A kernel has one arithmetic on every device and under Triton's interpreter: no two operations are fused into one that
rounds once, a division and a root round as IEEE 754 says (`div_rn`, `sqrt_rn`), and sums have an order that is written
down in the kernel. `INTERPRETED` says that the interpreter runs the kernels, on tensors of the CPU: TRITON_INTERPRET=1
was set when this module was imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTS = ("rows", "slots", "units", "chunks", "outputs", "blocks", "count")
POSITIONS = ("first", "end", "start")  # of rows: pointers into one tensor, 8 or 16 bytes apart by the number of rows
INTERPRETED = bool(triton.knobs.runtime.interpret)


def jit(function: Callable[..., Any]) -> Any:
    """Make a kernel, or a part of kernels, of `function`.

    Parameters with the names in COUNTS are no constants of the compiled kernel: rows come in every count, stores and
    matrices in many sizes. A kernel for each kind of count (one, multiples of 16, others) would cost time, and need not
    have the same order of sums. Nor is one compiled for each alignment of POSITIONS, which are read number by number.
    """
    names = inspect.signature(function).parameters
    return triton.jit(
        function,
        do_not_specialize=[name for name in names if name in COUNTS],
        do_not_specialize_on_alignment=[name for name in names if name in POSITIONS],
    )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` once for each place of `grid`, on the device of the first tensor among `arguments`."""
    if 0 in grid:
        return
    where = next(part.device for part in arguments if isinstance(part, Tensor))
    if INTERPRETED:
        with np.errstate(all="ignore"):  # no GPU says that an exponential is infinite
            kernel[grid](*arguments, enable_fp_fusion=False, **constants)
    elif where.type == "cuda" and where.index != torch.cuda.current_device():
        with torch.cuda.device(where):
            kernel[grid](*arguments, enable_fp_fusion=False, **constants)
    else:
        kernel[grid](*arguments, enable_fp_fusion=False, **constants)


def tiles(count: int, size: int) -> int:
    """Return how many tiles of `size` cover `count`."""
    return -(-count // size)


@jit
def rounded(x, dtype: tl.constexpr):
    """Round x float32 to `dtype`, half to even, and store it so; under the interpreter a cast to bfloat16 only cuts."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
