"""The seam: every arithmetic op of the decoder, by one name, whatever runs it.

`reference` (torch) defines the results. The native library, when it was built, does the same on CPU tensors,
faster: `block_linear`, `low_rank`, `rms_norm` and `rope` to the bit, `attention` and `gated` to float32 rounding
(their exp is another). Both are batch-invariant. Which one runs is chosen once, at import; SPECDEC_KERNELS=reference,
native, or native: and an instruction set (portable, avx2, avxvnni, avx512, neon, i8mm) forces a path, for tests
and comparisons. The choice never depends on anything that could change with the number of rows. A library that is
missing, stale or broken leaves the reference, which `missing` explains; with SPECDEC_REQUIRE_NATIVE=1 it is an error,
so that no test passes without it.

`fuse` makes one call of whole decoder layers, for the native library only: the same arithmetic, to the bit, without
the trips between Python and C++ that cost a small model more than its weights. Left out: a native `dense_linear`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import low_rank as _low_rank
from specdec.kernels import native as _native
from specdec.kernels import reference as _reference
from specdec.kernels.abi import Work
from specdec.kernels.blocks import BlockTensor, pack_blocks, unpack_blocks, unpack_sub
from specdec.kernels.draft import FusedDraft
from specdec.kernels.forms import BLOCK, GROUP, HALF, TABLES, BlockForm
from specdec.kernels.layers import FusedLayers, FusedPiece, LayerWeights, Span, StoreRows, fits
from specdec.kernels.low_rank import LowRank, pack_low_rank
from specdec.kernels.records import (
    AdapterRecords,
    DraftSampling,
    Matrix,
    MixtureWeights,
    adapter_records,
    plain,
    readable,
)
from specdec.kernels.store import KeyFromValue, KVView

__all__ = [
    "BLOCK",
    "CHOICES",
    "GROUP",
    "HALF",
    "TABLES",
    "AdapterRecords",
    "BlockForm",
    "BlockTensor",
    "DraftSampling",
    "FusedDraft",
    "FusedLayers",
    "FusedPiece",
    "KVView",
    "KeyFromValue",
    "LayerWeights",
    "LowRank",
    "Matrix",
    "MixtureWeights",
    "Span",
    "StoreRows",
    "Work",
    "active",
    "adapter_records",
    "arithmetic",
    "attention",
    "best",
    "block_linear",
    "block_rows",
    "choose",
    "dense_linear",
    "fuse",
    "fuse_draft",
    "gated",
    "invariant",
    "low_rank",
    "missing",
    "pack_blocks",
    "pack_low_rank",
    "quantise_store",
    "read_kv",
    "rms_norm",
    "rope",
    "unpack_blocks",
    "unpack_sub",
]

CHOICES = ("native", "reference", *(f"native:{word}" for word in _native.SETS))

_CHOSEN = "chosen"
_library = _native.load()
if isinstance(_library, str) and _native.is_required():
    raise RuntimeError(f"SPECDEC_REQUIRE_NATIVE is set, but {_library}; {_native.how_to_build()}")
_use: _native.Native | None = None
_why_not = ""


def choose(choice: str) -> str:
    """Select one of CHOICES for the whole process, and return `active()`.

    Raises ValueError for another word, or for an instruction set that this machine (or this build) lacks;
    "native" takes the best there is, down to the reference.
    """
    global _use, _why_not
    if choice not in CHOICES:
        raise ValueError(f"unknown kernels {choice!r}: choose one of {', '.join(CHOICES)}")
    if choice == "reference":
        _use, _why_not = None, _CHOSEN
    elif isinstance(_library, str):
        if choice != "native":
            raise ValueError(f"{choice} cannot be used: {_library}; {_native.how_to_build()}")
        _use, _why_not = None, _library
    else:
        word = choice.partition(":")[2]
        name = _native.SETS[word] if word else _library.available[-1]
        if name not in _library.available:
            raise ValueError(f"{choice} cannot be used: this CPU has {', '.join(_library.available)}")
        _library.use(name)
        _use = _library
    return active()


def active() -> str:
    """Say in words which kernels run: "native avx512-vnni, 2 threads", or "torch reference: " and the reason."""
    if _use is None:
        return f"torch reference: {_why_not}"
    if not _use.has_threads:
        return f"native {_use.instruction_set}, 1 thread (Windows: the kernels have no threads there yet)"
    threads = torch.get_num_threads()
    return f"native {_use.instruction_set}, {threads} thread{'s' if threads > 1 else ''}"


def missing() -> str | None:
    """Say why the torch reference runs although nobody chose it, and how to get the native kernels; None otherwise."""
    if _use is not None or _why_not == _CHOSEN:
        return None
    return f"{_why_not}; {_native.how_to_build()}"


def arithmetic() -> str:
    """Name the arithmetic that gives results their rounding here: a cache that another arithmetic filled has other
    bits."""
    return "reference" if _use is None else f"native {_use.instruction_set}"


def invariant(device: torch.device) -> bool:
    """Return whether a row has the same bits on `device` whatever the other rows of its pass are."""
    return device.type == "cpu"


def fuse(layers: Sequence[LayerWeights[Any]], stores: Sequence[int], norm: Tensor) -> FusedLayers | None:
    """Make one native call of `layers` and the norm after them (weight [hidden]).

    `stores`: for each layer the index of the K/V that it reads, and writes where it has `k`. None where op by op is the
    only way: no native kernels in use, weights that are not in blocks, vectors that are not float32, another device
    than the CPU.
    """
    if _use is None or not plain(norm) or not all(map(fits, layers)):
        return None
    library = _use
    return FusedLayers(library, layers, stores, norm, lambda: _use is library)


def fuse_draft(
    layers: FusedLayers | None,
    pre: Matrix,
    post: Matrix,
    head: Matrix,
    embedding: BlockTensor | None,
    embed_scale: float,
    ids: Tensor | None,
    fuse: Matrix | None = None,
    eps: float = 0.0,
) -> FusedDraft | None:
    """Make one native call for all steps of a draft, of fused `layers` and the matrices of a draft head around them.

    `embedding`: the backbone's; `ids` int64: the tokens of the head's rows, None: every one. `fuse`: what joins the
    states of other layers, normed with `eps`, to the last one. None where step by step is the only way, as in `fuse`.
    """
    blocks = (pre.blocks, post.blocks, head.blocks, embedding, *(() if fuse is None else (fuse.blocks,)))
    if layers is None or embedding is None or any(b is None or not b.q.is_cpu for b in blocks):
        return None
    return FusedDraft(layers, pre, post, head, embedding, embed_scale, ids, fuse, eps)


def block_linear(x: Tensor, w: BlockTensor) -> Tensor:
    """Multiply x [T, K], float32, bfloat16 or float16, by packed weights [N, K] -> [T, N] in x.dtype."""
    if x.dim() != 2 or x.shape[1] != w.columns:
        raise ValueError(f"x must be [T, {w.columns}] for weights [{w.rows}, {w.columns}]: {tuple(x.shape)}")
    if _use is None or not (x.is_cpu and w.q.is_cpu):
        return _reference.block_linear(x, w)
    return _use.block_linear(x, w)


def block_rows(ids: Tensor, w: BlockTensor, dtype: torch.dtype) -> Tensor:
    """Dequantise rows of packed weights, as of an embedding: ids long [T] -> [T, K] in dtype.

    Raises IndexError for an id that is not a row.
    """
    if _use is not None and ids.is_cpu and w.q.is_cpu:
        return _use.block_rows(ids, w, dtype)
    return _reference.block_rows(ids, w, dtype)


def best(x: Tensor) -> tuple[float, int]:
    """Return the largest of x [n] (n > 0) and the first index that has it; a NaN wins, wherever it is."""
    if _use is not None and plain(x):
        return _use.best(x)
    return _reference.best(x)


def gumbel_candidates(scores: Tensor, top: float, floor: float, key: int, ids: Tensor | None = None) -> Tensor:
    """Return the indices, ascending, of the tokens that can have the largest sum of score and noise: long [n].

    `scores` [candidates], the largest of them `top`; nothing at or below `floor` can win. `key`: of the noise at the
    position (see `specdec.engine.sampling.gumbel`), which is not added here; `ids` [candidates] int64, contiguous: the
    candidates' token ids, None where those are their indices.
    """
    if _use is not None and plain(scores):
        return _use.gumbel_candidates(scores, top, floor, key, ids)
    return _reference.gumbel_candidates(scores, top, floor, key)


def low_rank(x: Tensor, part: LowRank) -> Tensor:
    """Multiply x [T, K] by a low-rank part of a matrix [N, K] -> [T, N] in x.dtype, to be added to the product."""
    if x.dim() != 2 or x.shape[1] != part.inputs:
        raise ValueError(f"x must be [T, {part.inputs}] for a low-rank part of so many inputs: {tuple(x.shape)}")
    if _use is None or not (x.is_cpu and part.down.is_cpu):
        return _low_rank.low_rank(x, part)
    return _use.low_rank(x, part)


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [T, K] by w [N, K] and add bias [N] -> [T, N] in x.dtype."""
    return _reference.dense_linear(x, w, bias)


quantise_store = _reference.quantise_store
read_kv = _reference.read_kv


def attention(q: Tensor, kv: KVView, lo: Sequence[int], hi: Sequence[int], scale: float) -> Tensor:
    """Attend with queries q [T, Hq, D] to a store of keys and values -> [T, Hq, Dv] in q.dtype.

    Row t sees positions lo[t]..hi[t]-1, at most as many as there are slots. A row that sees nothing is zero. Query
    heads Hq/Hkv * h .. share key head h. Other types are expanded to float32: bfloat16, int8 * scale, and keys that are
    made from values.
    """
    rows, heads, width = q.shape
    if kv.key_width != width or heads % kv.kv_heads or not len(lo) == len(hi) == rows:
        raise ValueError(
            "attention wants q [T, Hq, D], keys [Hkv, S, D] and T bounds; got "
            f"{tuple(q.shape)}, keys {(kv.kv_heads, kv.slots, kv.key_width)}, {len(lo)} and {len(hi)}"
        )
    if _use is None or not readable(kv) or _elsewhere(q, *kv.tensors()):
        return _reference.attention(q, kv, lo, hi, scale)
    return _use.attention(q, kv, lo, hi, scale)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm x [..., D]: x / sqrt(mean(x^2) + eps), times weight [D], in float32, then in x.dtype."""
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {tuple(weight.shape)}")
    if _use is None or _elsewhere(x, weight):
        return _reference.rms_norm(x, weight, eps)
    return _use.rms_norm(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by cos and sin [T, D], halves convention -> [T, H, D]."""
    expected = (x.shape[0], x.shape[2])
    if cos.shape != expected or sin.shape != expected or x.shape[2] % 2:
        raise ValueError(f"cos and sin must be [T, D] = {expected}, D even: {cos.shape}, {sin.shape}")
    if _use is None or _elsewhere(x, cos, sin):
        return _reference.rope(x, cos, sin)
    return _use.rope(x, cos, sin)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute activation(gate) * up, both [T, I]; activation is "silu" or "gelu_tanh"."""
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    if _use is None or activation not in ("silu", "gelu_tanh") or _elsewhere(gate, up):
        return _reference.gated(gate, up, activation)
    return _use.gated(gate, up, activation)


def _elsewhere(*tensors: Tensor | None) -> bool:
    """Return whether torch must compute: a tensor is on another device, or gradients are being recorded."""
    recording = torch.is_grad_enabled()
    return any(t is not None and (not t.is_cpu or (recording and t.requires_grad)) for t in tensors)


try:
    choose(os.environ.get("SPECDEC_KERNELS", "native"))
except ValueError as error:
    warnings.warn(f"SPECDEC_KERNELS: {error}; using the best there is", RuntimeWarning, stacklevel=2)
    choose("native")
