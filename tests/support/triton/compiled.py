"""Compile the kernels for a GPU that is not here: `python -m tests.support.triton.compiled 90`, without
TRITON_INTERPRET, prints one JSON object for each kernel.

Triton's compiler needs a driver to tell it the GPU's kind, and no GPU. The ops are called as ever, on tensors of the
CPU, and what they would launch is compiled instead.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from specdec.kernels import KeyFromValue, KVView, pack_low_rank
from tests.support.native.kernel_paths import Kind, packed

MODULES = ("quantise", "product", "norm", "rows", "low_rank", "attention", "append", "choice")

zeros = partial(torch.zeros, dtype=torch.float32)  # shapes and types decide what is compiled, no number does


class Driver:
    """Pretend to be the driver of a GPU of compute capability `arch`."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_instead(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    made = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=False, **constants)
    ptx = made.asm["ptx"]
    found = {
        "kernel": kernel.__name__.strip("_"),
        "constants": {name: value for name, value in constants.items() if isinstance(value, (int, float))},
        "fused": len(re.findall(r"\bfma\.rn", ptx)),
        "flushed": len(re.findall(r"\b(?:add|mul|div|sqrt)[.\w]*\.ftz", ptx)),
        "matrix": sorted({*re.findall(r"(?:wgmma\.mma_async|mma)\.sync[.\w:]*", ptx)}),
        "bytes": len(made.asm["cubin"]),
        "shared": made.metadata.shared,
    }
    print(json.dumps(found), flush=True)


def main(arch: int) -> None:
    triton.runtime.driver.set_active(Driver(arch))
    modules = [import_module(f"specdec.kernels.triton.{name}") for name in MODULES]
    quantise, product, norm, rows, low_rank, attention, append, choice = modules
    for module in modules:
        module.launch = compile_instead
    few, many = zeros(1, 128), zeros(64, 128)
    for kind in (Kind(4), Kind(5, True), Kind(8), Kind(4, table="iq4")):
        product.block_linear(few.bfloat16(), packed(64, 128, kind))
    w = packed(64, 128, Kind(4))
    product.block_linear(many, w)
    for x in (few, many):
        product.gated_product(quantise.quantise(x), w, w, "gelu_tanh", torch.bfloat16)
    rows.block_rows(torch.zeros(3, dtype=torch.int64), w, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        product.dense_linear(many.to(dtype), many.to(dtype))
    norm.rms_norm(few, few[0], 1e-6)
    norm.norm_quantise(few, few[0], 1e-6)
    norm.add_norm_quantise(few, few, few[0], few[0], 1e-6)
    rows.rope(zeros(3, 8, 64), zeros(3, 64), zeros(3, 64))
    rows.gated(few, few, "silu")
    low_rank.low_rank(few, pack_low_rank(zeros(8, 128), zeros(64, 8), 0.5))
    for view in views():
        width = view.key_width
        dtype = torch.float32 if view.values.dtype is torch.float32 else torch.bfloat16
        q, k = zeros(3, 16, width).to(dtype), zeros(3, view.kv_heads, width).to(dtype)
        bounds, position = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        attention.attention(q, view, bounds, bounds, 1.0)
        turns = zeros(3, width).to(dtype)
        append.norm_rope_append(view, position, q, k, k, q[0, 0], k[0, 0], 1e-6, turns, turns, norm_values=True)
    choice.choose(zeros(3, 5000), bounds, torch.zeros(5000, dtype=torch.int64), bounds > 0)


def views() -> Iterator[KVView]:
    """Yield stores as Gemma 4 12B has them, and a small model's: each takes seconds to compile."""
    ring, full, table = zeros(8, 1087, 256), zeros(1, 2048, 512), zeros(2048, 64)
    yield KVView(ring.bfloat16(), ring.bfloat16())
    yield KVView(ring.char(), ring.char(), ring[:, :, 0], ring[:, :, 0])
    made = KeyFromValue(full[0, 0], table, table)
    yield KVView(None, full.bfloat16(), key_from_value=made)
    yield KVView(None, full.char(), value_scale=full[:, :, 0], key_from_value=made)
    yield KVView(ring[:, :, :64].contiguous(), ring[:, :, :64].contiguous())


if __name__ == "__main__":
    main(int(sys.argv[1]))
