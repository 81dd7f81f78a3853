"""Where Triton's kernels run in tests: on the GPU where there is one, else on the CPU under Triton's interpreter, which
`tests/conftest.py` asks for. Tests take the kernels' modules from here, because without Triton they are skipped.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from specdec.kernels.blocks import BlockTensor
from specdec.kernels.store import KVView
from specdec.kernels.triton import Triton, check, norm, product, quantise, rows
from specdec.kernels.triton.append import append, norm_rope, norm_rope_append
from specdec.kernels.triton.attention import attention
from specdec.kernels.triton.choice import best, choose
from specdec.kernels.triton.launch import INTERPRETED
from specdec.kernels.triton.low_rank import low_rank
from tests.support.native.kernel_paths import KINDS, Kind, packed
from tests.support.triton.interpreter import patch_once

__all__ = [
    "Triton", "append", "attention", "best", "check", "choose", "low_rank", "norm", "norm_rope", "norm_rope_append",
    "product", "quantise", "rows",
]  # fmt: skip

if INTERPRETED:
    patch_once()
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
ROWS = (1, 2, 3, 5, 8, 16, 17, 33)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
READ = [
    kind for kind in KINDS if packed(16, 32, kind).form in product.KERNEL_FORMS
]  # by a kernel; the others are expanded
EXPANDED = [kind for kind in KINDS if kind not in READ]


def same(found: Tensor, wanted: Tensor) -> bool:
    """Return whether `found`, on the device, has the bits of `wanted`; every NaN counts as one number."""
    here = found.cpu()
    if here.dtype is not wanted.dtype or not torch.equal(here.isnan(), wanted.isnan()):
        return False
    return torch.equal(here.nan_to_num(), wanted.nan_to_num())


def blocks(outputs: int, inputs: int, kind: Kind) -> tuple[BlockTensor, BlockTensor]:
    """Return a random matrix on the CPU, for the reference, and the same one on the device."""
    w = packed(outputs, inputs, kind)
    return w, w.to(DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers of torch's own generator, rounded to `dtype`."""
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def spread(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random rows of very different magnitudes."""
    size = torch.logspace(-6, 4, count, dtype=torch.float32).view(-1, *[1] * len(shape))  # [count, 1, ...]
    return (normal(count, *shape) * size).to(dtype)


def moved(kv: KVView) -> KVView:
    """Return a store on the device."""
    return kv.to(DEVICE)
