"""The compiled kernels, through ctypes on data pointers.

The library (`native.cpp`) is built when the package is installed and a C++ compiler is there (`setup.py`); it
knows nothing of Python or torch, so one binary serves every version of both. Nothing is compiled here, and a
library that is missing or does not load is a reason (a string), never an exception.

Each method takes CPU tensors, computes in float32, and returns a new tensor in the input's dtype. Bits do not
depend on the number of rows, the number of threads, or the instruction set. Left out: gradients.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from specdec.kernels.blocks import BlockTensor

SETS = ("portable", "avx2", "avx512-vnni")
_SUFFIXES = (".so", ".dylib", ".dll")
_SIGNATURES = {
    "specdec_block_linear": [c_void_p] * 5 + [c_int64] * 3 + [c_int] * 2,
    "specdec_attention": [c_void_p] * 6 + [c_float, c_void_p] + [c_int64] * 6 + [c_int],
    "specdec_rms_norm": [c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64, c_int],
    "specdec_rope": [c_void_p] * 4 + [c_int64] * 3 + [c_int],
    "specdec_gated": [c_void_p, c_void_p, c_int, c_void_p, c_int64, c_int64, c_int],
    "specdec_use_set": [c_int],
    "specdec_best_set": [],
    "specdec_has_threads": [],
}


def load(folder: Path = Path(__file__).parent) -> Native | str:
    """The library in a folder (where it is installed: beside this file), or why it cannot be used."""
    found = [path for path in folder.glob("_native.*") if path.suffix in _SUFFIXES]
    if not found:
        return "no native library; reinstall with a C++ compiler (g++ or clang++) to get it"
    try:
        return Native(found[0])
    except (OSError, AttributeError) as error:
        return f"the native library does not load ({error}); reinstall to build it again"


class Native:
    """The library, using the best instruction set of this CPU until `use` says otherwise."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or AttributeError when the file is no library, or another one."""
        self.path = path
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
        self._library = library
        self._block_linear = library.specdec_block_linear
        self._attention = library.specdec_attention
        self._rms_norm = library.specdec_rms_norm
        self._rope = library.specdec_rope
        self._gated = library.specdec_gated
        self.has_threads = bool(library.specdec_has_threads())
        self.available = SETS[: library.specdec_best_set() + 1]
        self.instruction_set = self.available[-1]

    def use(self, instruction_set: str) -> None:
        """Run on one of `available` from now on (process-wide)."""
        assert instruction_set in self.available, instruction_set
        self._library.specdec_use_set(SETS.index(instruction_set))
        self.instruction_set = instruction_set

    def block_linear(self, x: Tensor, w: BlockTensor) -> Tensor:
        wide = x.float().contiguous()  # both cost nothing when there is nothing to do; .to(dtype) does
        rows = x.shape[0]
        out = wide.new_empty(rows, w.rows)
        code = self._block_linear(
            wide.data_ptr(),
            w.q.data_ptr(),
            w.scale.data_ptr(),
            None if w.minimum is None else w.minimum.data_ptr(),
            out.data_ptr(),
            rows,
            w.columns,
            w.rows,
            w.bits,
            torch.get_num_threads(),
        )
        _check(code)
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lo: list[int], hi: list[int], scale: float) -> Tensor:
        rows, heads, width = q.shape
        kv_heads, slots, value_width = v.shape
        wide = q.float().contiguous()
        if k.stride(2) != 1:
            k = k.contiguous()
        if v.stride(2) != 1:
            v = v.contiguous()
        strides = (c_int64 * 4)(k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        out = wide.new_empty(rows, heads, value_width)
        code = self._attention(
            wide.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            strides,
            (c_int64 * rows)(*lo),
            (c_int64 * rows)(*hi),
            scale,
            out.data_ptr(),
            rows,
            heads,
            kv_heads,
            width,
            value_width,
            slots,
            torch.get_num_threads(),
        )
        assert code != 2, f"a row sees positions that a ring of {slots} slots does not hold: {lo} to {hi}"
        _check(code)
        return out if q.dtype is torch.float32 else out.to(q.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.float().contiguous()
        scale = None if weight is None else weight.float().contiguous()
        out = torch.empty_like(wide)
        width = x.shape[-1]
        code = self._rms_norm(
            wide.data_ptr(),
            None if scale is None else scale.data_ptr(),
            eps,
            out.data_ptr(),
            x.numel() // width,
            width,
            torch.get_num_threads(),
        )
        _check(code)
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.float().contiguous()
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        out = torch.empty_like(wide)
        self._rope(
            wide.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            *x.shape,
            torch.get_num_threads(),
        )
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        wide, other = gate.float().contiguous(), up.float().contiguous()
        out = torch.empty_like(wide)
        width = gate.shape[-1]
        self._gated(
            wide.data_ptr(),
            other.data_ptr(),
            activation == "gelu_tanh",
            out.data_ptr(),
            gate.numel() // width,
            width,
            torch.get_num_threads(),
        )
        return out if gate.dtype is torch.float32 else out.to(gate.dtype)


def _check(code: int) -> None:
    if code:
        raise MemoryError("the native kernels could not allocate their scratch memory; use a smaller prompt")
