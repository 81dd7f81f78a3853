"""Run the ops of the decoder on a GPU, with kernels that Triton compiles.

The arithmetic is the reference's, to the bit where it has one result (`launch.py` says how), and a row never depends on
the rows beside it. `open_library` gives what the seam calls (`specdec/kernels/libraries/`): each op by its kernel where
that passed `check.py` on the device, by torch where not. Under Triton's interpreter the same kernels run on tensors of
the CPU, for tests. Left out: gradients, for which torch computes.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.blocks import BlockTensor
from specdec.kernels.draft import DraftParts
from specdec.kernels.forms import BlockForm
from specdec.kernels.layers import LayerWeights
from specdec.kernels.low_rank import LowRank
from specdec.kernels.low_rank import low_rank as low_rank_reference
from specdec.kernels.store import KVView
from specdec.kernels.triton import check, norm, product, rows
from specdec.kernels.triton.append import norm_rope_append
from specdec.kernels.triton.attention import attention
from specdec.kernels.triton.launch import INTERPRETED
from specdec.kernels.triton.low_rank import low_rank
from specdec.kernels.triton.passes.check import StoreForm, check_append, check_attention, check_choice, check_store
from specdec.kernels.triton.passes.draft import DeviceDraft
from specdec.kernels.triton.passes.graphs import CUDACapture, Graphs
from specdec.kernels.triton.passes.layers import DeviceLayers


def _attention(q: Tensor, kv: KVView, lo: Sequence[int], hi: Sequence[int], scale: float) -> Tensor:
    """Attend as `reference.attention` does."""
    first, end = (torch.tensor(bounds, dtype=torch.int64, device=q.device) for bounds in (lo, hi))
    return attention(q, kv, first, end, scale)


# What computes an op, what defines it, and what compares the two.
_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[torch.device], None]]] = {
    "rms_norm": (norm.rms_norm, reference.rms_norm, check.check_norm),
    "rope": (rows.rope, reference.rope, check.check_rope),
    "gated": (rows.gated, reference.gated, check.check_gated),
    "dense_linear": (product.dense_linear, reference.dense_linear, check.check_dense),
    "low_rank": (low_rank, low_rank_reference, check.check_low_rank),
    "attention": (_attention, reference.attention, check_attention),
    "append": (norm_rope_append, reference.rope, check_append),
}
_OF_A_PASS = ("rms_norm", "rope", "gated", "attention", "append")  # without which none is made at once


class Triton:
    """Run ops on one device. `refused` says, for each op, form of blocks and form of stores for which torch computes
    instead, what was wrong with the kernel."""

    def __init__(self, device: torch.device) -> None:
        """Check the kernels on `device`. Forms of blocks and of stores are checked when they are first met, because
        each takes seconds to compile."""
        self.device = device
        self.refused = {name: why for name, (*_, test) in _OPS.items() if (why := check.failure(test, device))}
        self._checked: dict[BlockForm | StoreForm, bool] = {}
        self._checking = threading.RLock()
        self._choice_holds: bool | None = None  # not known before a head drafts
        self.rms_norm, self.rope, self.gated = map(self._op, ("rms_norm", "rope", "gated"))
        self._dense_linear, self._low_rank = map(self._op, ("dense_linear", "low_rank"))
        self.graphs = Graphs(CUDACapture() if device.type == "cuda" else None)

    def _op(self, name: str) -> Callable[..., Any]:
        kernel, defined, _ = _OPS[name]
        return defined if name in self.refused else kernel

    def describe(self) -> str:
        """Say in words what runs: "triton 3.7.1 on NVIDIA H100", and what torch computes instead."""
        return f"{self.arithmetic}; {self.sentence()}" if self.refused else self.arithmetic

    @property
    def arithmetic(self) -> str:
        """Name what gives results their rounding: Triton's version and the device, and the ops that torch computes."""
        where = "its interpreter" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        without = f" without {', '.join(sorted(self.refused))}" if self.refused else ""
        return f"triton {triton.__version__} on {where}{without}"

    def sentence(self) -> str:
        """Say what torch computes instead of the kernels here, and why; "" where it is nothing."""
        if not self.refused:
            return ""
        found = "; ".join(f"{name} ({why})" for name, why in self.refused.items())
        return f"torch computes what kernels that failed their check here would: {found}"

    def reads(self, form: BlockForm) -> bool:
        """Return whether kernels read blocks of `form` here; the first call checks that, and warns where one fails."""
        name = f"{form.bits}-bit blocks{' with a minimum' * form.minimum}{' with a table' * form.table}"
        return form in product.KERNEL_FORMS and self._holds(form, name, partial(check.check_form, form))

    def keeps(self, view: KVView, rows: torch.dtype) -> bool:
        """Return whether kernels read and write stores like `view` here, for rows of the type `rows`; the first call
        checks that, and warns where one fails."""
        form = StoreForm.of(view, rows)
        return self._holds(form, str(form), partial(check_store, form))

    def _holds(self, form: BlockForm | StoreForm, name: str, test: Callable[[torch.device], None]) -> bool:
        if form not in self._checked:
            with self._checking:  # two models may meet a form at once
                if form not in self._checked:
                    if why := check.failure(test, self.device):
                        self.refused = {**self.refused, name: why}  # another thread may be going through it
                        warnings.warn(self.sentence(), RuntimeWarning, stacklevel=4)
                    self._checked[form] = not why
        return self._checked[form]

    def attention(self, q: Tensor, kv: KVView, lo: Sequence[int], hi: Sequence[int], scale: float) -> Tensor:
        """Attend with q [T, Hq, D] as `reference.attention` does -> [T, Hq, Dv] in q.dtype."""
        op = self._op("attention") if self.keeps(kv, q.dtype) else reference.attention
        out: Tensor = op(q, kv, lo, hi, scale)
        return out

    def block_linear(self, x: Tensor, w: BlockTensor) -> Tensor:
        """Multiply x [T, K] by packed weights -> [T, N] in x.dtype. Blocks without a kernel are expanded in slices."""
        if reference.recorded(x):
            return reference.expanded_linear(x, w)
        if self.reads(w.form):
            return product.block_linear(x, w)
        return reference.expanded_linear(x, w, self._dense_linear)

    def block_rows(self, ids: Tensor, w: BlockTensor, dtype: torch.dtype) -> Tensor:
        """Dequantise rows `ids` [T] of packed weights -> [T, K] in dtype. Raises IndexError for an id outside, for
        which the host waits for the device; `rows.block_rows` does not."""
        if not self.reads(w.form):
            return reference.block_rows(ids, w, dtype)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < w.rows:
            raise IndexError(f"ids must be from 0 to {w.rows - 1}, got {ids.tolist()}")
        return rows.block_rows(ids.to(w.device), w, dtype)

    def dense_linear(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x [T, K] by w [N, K] and add bias [N] -> [T, N] in x.dtype."""
        op = reference.dense_linear if reference.recorded(x, w, bias) else self._dense_linear
        out: Tensor = op(x, w, bias)
        return out

    def low_rank(self, x: Tensor, part: LowRank) -> Tensor:
        """Multiply x [T, K] by a low-rank part [N, K] -> [T, N] in x.dtype."""
        out: Tensor = (low_rank_reference if reference.recorded(x) else self._low_rank)(x, part)
        return out

    def fuse(
        self, layers: Sequence[LayerWeights[Any]], stores: Sequence[int], norm: Tensor, in_use: Callable[[], bool]
    ) -> DeviceLayers | None:
        """Return what runs `layers` and the norm after them as one pass; None where a kernel for that failed its
        check."""
        if any(name in self.refused for name in _OF_A_PASS):
            return None
        return DeviceLayers(layers, stores, norm, in_use, self.reads, self.keeps, self.graphs)

    def fuse_draft(self, layers: DeviceLayers, parts: DraftParts) -> DeviceDraft | None:
        """Return what makes all steps of a draft as one pass; None where the kernels do not read the blocks of a
        matrix, or cannot choose tokens, which is checked here."""
        if not self._chooses():
            return None
        if not all(blocks is not None and self.reads(blocks.form) for blocks in parts.blocks):
            return None
        return DeviceDraft(layers, parts)

    def _chooses(self) -> bool:
        """Return whether the kernel that chooses drafted tokens holds; the first call checks that, and warns. It is not
        among the `refused`: no text depends on it."""
        with self._checking:
            if self._choice_holds is None:
                why = check.failure(check_choice, self.device)
                self._choice_holds = not why
                if why:
                    said = f"drafts go step by step: the choice of a token failed its check ({why})"
                    warnings.warn(said, RuntimeWarning, stacklevel=3)
        return self._choice_holds

    best = staticmethod(reference.best)
    gumbel_candidates = staticmethod(reference.gumbel_candidates)


@cache
def open_library(device: torch.device) -> Triton | str:
    """Return what runs ops on `device`, of CUDA or, under the interpreter, the CPU; or say in words why not."""
    if device.type == "cpu" and not INTERPRETED:
        return (
            "Triton's kernels run on a GPU, or under Triton's interpreter where TRITON_INTERPRET=1 is set at the start"
        )
    if device.type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET is set, so that Triton's interpreter would run the kernels on the CPU"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device here"
    library = Triton(device)
    return library.sentence() if len(library.refused) == len(_OPS) else library
