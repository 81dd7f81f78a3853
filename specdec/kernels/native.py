"""The compiled kernels, through ctypes on data pointers.

The library (`csrc/native.cpp`) is built when the package is installed and a C++ compiler is there (`setup.py`); it
knows nothing of Python or torch, so one binary serves every version of both. Nothing is compiled here, and a
library that is missing or does not load is a reason (a string), never an exception.

Each method takes CPU tensors, computes in float32, and returns a new tensor in the input's dtype. Bits do not
depend on the number of rows, the number of threads, or the instruction set. A pointer says nothing of what it points
to, so what the library writes is made here with its dtype, and what it reads is converted or asserted to be what it
takes. Left out: gradients.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from ctypes import Array, addressof, byref, c_float, c_int64, c_uint64, c_void_p
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import abi, reference
from specdec.kernels.blocks import BlockTensor
from specdec.kernels.low_rank import LowRank
from specdec.kernels.records import (
    DraftSampling,
    address,
    low_rank_record,
    plain,
    plain_ids,
    readable,
    store_record,
    weights_record,
)
from specdec.kernels.sources import what_to_install
from specdec.kernels.store import KVView

# The library's names of instruction sets, by the words that choose them.
SETS = {
    "portable": "portable",
    "avx2": "avx2",
    "avxvnni": "avx-vnni",
    "avx512": "avx512-vnni",
    "neon": "neon-dotprod",
    "i8mm": "neon-i8mm",
}
_SUFFIXES = (".so", ".dylib", ".dll")


def load(folder: Path = Path(__file__).parent) -> Native | str:
    """Load the library in `folder` (default: beside this file), or say in words why it cannot be used."""
    found = [path for path in folder.glob("_native.*") if path.suffix in _SUFFIXES]
    if not found:
        return "no native library was built here"
    try:
        return Native(found[0], folder / "csrc")
    except abi.UnusableLibraryError as error:
        return str(error)


def is_required() -> bool:
    """Return whether SPECDEC_REQUIRE_NATIVE asks for an error where the library cannot be used."""
    return os.environ.get("SPECDEC_REQUIRE_NATIVE", "") not in ("", "0")


def how_to_build() -> str:
    """Say in words how to get the library: a compiler, and the command that builds and installs it."""
    root = Path(__file__).resolve().parents[2]
    place = f'"{root}"' if sys.platform == "win32" else shlex.quote(str(root))  # as the system's shell takes it
    command = "pip install --force-reinstall --no-deps . (in the folder that specdec was installed from)"
    if (root / "setup.py").is_file():  # in use where it was checked out: `-e` puts the library there
        command = f"pip install --no-deps -e {place}"
    return f"{what_to_install(sys.platform)}, then run: {command}"


class Native:
    """Call the library, on the best instruction set of this CPU until `use` names another. What it does not read, the
    reference computes."""

    dense_linear = staticmethod(reference.dense_linear)

    def __init__(self, path: Path, sources: Path) -> None:
        """Open the library at `path`, which was built from the folder `sources`. Raises as `abi.open_library` does."""
        self.path = path
        self._library = library = abi.open_library(path, sources)
        self._block_linear = library.specdec_block_linear
        self._block_rows = library.specdec_block_rows
        self._low_rank = library.specdec_low_rank
        self._layers = library.specdec_layers
        self._draft = library.specdec_draft
        self._best = library.specdec_best
        self._gumbel_candidates = library.specdec_gumbel_candidates
        self._sampled_token = library.specdec_sampled_token
        self._attention = library.specdec_attention
        self._rms_norm = library.specdec_rms_norm
        self._rope = library.specdec_rope
        self._gated = library.specdec_gated
        self.has_threads = bool(library.specdec_has_threads())
        names = takewhile(bool, map(library.specdec_set_name, count()))
        self.available = tuple(name.decode() for name in names)  # what this CPU runs, the best last
        self.instruction_set = self.available[-1]

    def use(self, instruction_set: str) -> None:
        """Run on `instruction_set`, one of `available`, from now on; in the whole process."""
        code = self._library.specdec_use_set(instruction_set.encode())
        assert not code, instruction_set
        self.instruction_set = instruction_set

    def block_linear(self, x: Tensor, w: BlockTensor) -> Tensor:
        """Multiply x [T, K] by packed weights [N, K]: [T, N]. Raises MemoryError without scratch memory."""
        wide = x.float().contiguous()  # both cost nothing when there is nothing to do; .to(dtype) does
        rows = x.shape[0]
        out = wide.new_empty(rows, w.rows)
        code = self._block_linear(
            wide.data_ptr(), byref(weights_record(w)), out.data_ptr(), rows, w.rows, torch.get_num_threads()
        )
        _check(code)
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def block_rows(self, ids: Tensor, w: BlockTensor, dtype: torch.dtype) -> Tensor:
        """Return rows `ids` [T] of packed weights as [T, K] `dtype`. Raises IndexError for an id outside."""
        out = torch.empty(ids.shape[0], w.columns, dtype=torch.float32)
        ids = ids.long().contiguous()
        code = self._block_rows(ids.data_ptr(), byref(weights_record(w)), out.data_ptr(), len(ids), w.rows)
        if code:
            raise IndexError(f"ids must be from 0 to {w.rows - 1}, got {ids.tolist()}")
        return out if dtype is torch.float32 else out.to(dtype)

    def low_rank(self, x: Tensor, part: LowRank) -> Tensor:
        """Multiply x [T, K] by a low-rank part [N, K]: [T, N]. Raises MemoryError without scratch memory."""
        wide = x.float().contiguous()
        out = wide.new_empty(x.shape[0], part.outputs)
        record, threads = low_rank_record(part), torch.get_num_threads()
        _check(self._low_rank(wide.data_ptr(), byref(record), out.data_ptr(), *wide.shape, part.outputs, threads))
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def best(self, x: Tensor) -> tuple[float, int]:
        """Return the largest of x float32 [n] and the first index that has it."""
        if not plain(x):
            return reference.best(x)
        value = c_float()
        index: int = self._best(x.data_ptr(), x.numel(), byref(value))
        return value.value, index

    def gumbel_candidates(self, scores: Tensor, top: float, floor: float, key: int, ids: Tensor | None) -> Tensor:
        """Return the ascending indices of tokens whose score and noise can win, int64; `ids` [n]: the tokens of the
        scores."""
        if not plain(scores):
            return reference.gumbel_candidates(scores, top, floor, key)
        assert ids is None or (plain_ids(ids) and ids.numel() == scores.numel())
        found = torch.empty(scores.numel(), dtype=torch.int64)
        of = None if ids is None else ids.data_ptr()
        kept: int = self._gumbel_candidates(scores.data_ptr(), of, scores.numel(), top, floor, key, found.data_ptr())
        return found[:kept]

    def sampled_token(
        self, logits: Tensor, key: int, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> int | None:
        """Return `sampled_token` of `specdec.kernels` for float32 logits [n]; None as there."""
        if not plain(logits):
            return None
        token: int = self._sampled_token(logits.data_ptr(), logits.numel(), temperature, top_k, top_p, min_p, key)
        return None if token < 0 else token

    def attention(self, q: Tensor, kv: KVView, lo: Sequence[int], hi: Sequence[int], scale: float) -> Tensor:
        """Attend with queries q [T, Hq, D] to a store: [T, Hq, Dv]; row t sees positions lo[t] .. hi[t] - 1."""
        if not readable(kv):
            return reference.attention(q, kv, lo, hi, scale)
        rows, heads, _ = q.shape
        wide = q.float().contiguous()
        out = wide.new_empty(rows, heads, kv.value_width)
        store = store_record(kv)
        code = self._attention(
            wide.data_ptr(),
            byref(store),
            (c_int64 * rows)(*lo),
            (c_int64 * rows)(*hi),
            scale,
            out.data_ptr(),
            rows,
            heads,
            kv.kv_heads,
            torch.get_num_threads(),
        )
        assert code != 2, f"a row sees positions that a ring of {kv.slots} slots does not hold: {lo} to {hi}"
        _check(code)
        return out if q.dtype is torch.float32 else out.to(q.dtype)

    def layers(
        self,
        layers: Array[abi.Layer],
        spans: Array[abi.Span],
        starts: Array[Any],
        positions: Array[Any],
        stores: Array[Any],
        adapters: Array[Any] | None,
        norm: Tensor | None,
        x: Tensor,
        extra: Tensor | None,
        aux: Array[Any] | None = None,
        work: abi.Work = abi.Work.ALL,
    ) -> None:
        """Take rows x float32 [T, hidden] (contiguous) through layers and a norm (None: no norm), in place.

        `starts`: the first row of each text, and T at the end. `positions`: that of each text's first row. `stores`:
        where each text's stores are. `adapters`: where each text's low-rank parts of these layers are; null: nowhere.
        `extra` [T, layers, width]: per-layer inputs. `aux`: for each layer where its
        output [T, hidden] goes too; null: nowhere. `work` KEYS writes K and V and leaves x as it is.
        """
        assert plain(x) and all(part is None or plain(part) for part in (norm, extra))
        code = self._layers(
            layers,
            len(layers),
            spans,
            len(stores),
            starts,
            positions,
            stores,
            adapters,
            address(norm),
            x.data_ptr(),
            *x.shape,
            address(extra),
            0 if extra is None else extra.shape[2],
            aux,
            work,
            torch.get_num_threads(),
        )
        assert code != 2, "a row sees positions that a ring does not hold"
        _check(code)

    def draft(
        self,
        drafter: abi.Drafter,
        layers: Array[abi.Layer],
        spans: Array[abi.Span],
        stores: Array[Any],
        norm: Tensor,
        state: Tensor,
        aux: Sequence[Tensor],
        newest: int,
        steps: int,
        sampling: DraftSampling | None,
        sharpness: float,
        floors: Sequence[float],
    ) -> tuple[list[int], list[float]]:
        """Draft up to `steps` tokens after `newest`, as `FusedDraft` does. `state` [backbone hidden] and each of `aux`:
        float32 and contiguous."""
        assert plain(norm) and plain(state) and all(map(plain, aux)) and len(floors) in (0, steps)
        x, tokens = torch.empty_like(norm), (c_int64 * steps)()
        shares, least, made = (c_float * steps)(), (c_float * steps)(*floors), c_int64()
        sure = abi.DraftChances(addressof(shares), addressof(least), sharpness)
        given = None
        if sampling is not None:
            keys = (c_uint64 * steps)(*sampling.keys)
            given = abi.DraftSampling(addressof(keys), *sampling[1:])
        code = self._draft(
            byref(drafter),
            layers,
            len(layers),
            spans,
            stores,
            norm.data_ptr(),
            x.data_ptr(),
            x.numel(),
            state.data_ptr(),
            (c_void_p * len(aux))(*(each.data_ptr() for each in aux)),
            newest,
            steps,
            None if given is None else byref(given),
            byref(sure),
            tokens,
            byref(made),
            torch.get_num_threads(),
        )
        assert code not in (2, 3), "the row sees positions that a ring does not hold, or a token is none"
        _check(code)
        return tokens[: made.value], shares[: made.value]

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Norm x [..., D] by its root mean square, times weight [D] where there is one."""
        wide = x.float().contiguous()
        scale = None if weight is None else weight.float().contiguous()
        out = torch.empty_like(wide)
        width = x.shape[-1]
        shape, threads = (x.numel() // width, width), torch.get_num_threads()
        _check(self._rms_norm(wide.data_ptr(), address(scale), eps, out.data_ptr(), *shape, threads))
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [T, H, D] by cos and sin [T, D]."""
        wide = x.float().contiguous()
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        out = torch.empty_like(wide)
        self._rope(wide.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *x.shape, torch.get_num_threads())
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """Return activation(gate) * up, both [T, I]; "gelu_tanh", or "silu" for any other word."""
        wide, other = gate.float().contiguous(), up.float().contiguous()
        out = torch.empty_like(wide)
        width = gate.shape[-1]
        shape, threads = (gate.numel() // width, width), torch.get_num_threads()
        is_gelu = activation == "gelu_tanh"
        self._gated(wide.data_ptr(), other.data_ptr(), is_gelu, out.data_ptr(), *shape, threads)
        return out if gate.dtype is torch.float32 else out.to(gate.dtype)


def _check(code: int) -> None:
    if code:
        raise MemoryError("the native kernels could not allocate their scratch memory; use a smaller prompt")
