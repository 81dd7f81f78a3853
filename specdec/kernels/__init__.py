"""The seam: every arithmetic op of the decoder, by one name, whatever runs it.

`reference` (torch) defines the results. Two libraries do the same, faster, and each is batch-invariant: on CPU tensors
the native library, when it was built, and on a CUDA device Triton's kernels (`triton/`), when the extra `gpu` is
installed. Both do `block_linear`, `low_rank`, `rms_norm` and `rope` to the bit. `attention` and `gated` are near the
reference, because their exp is another; so is `dense_linear` on a GPU, and attention there multiplies 16 bits of a
number where the store has no more (`triton/attention.py`). `libraries/` says which library computes on which device.

`fuse` makes one call of whole decoder layers, to the same bits as op by op. On the CPU (`FusedLayers`) that saves the
trips between Python and C++, which cost a small model more than its weights; on a GPU (`DeviceLayers`) the launches are
captured and replayed together. `fuse_draft` does so for a draft of an MTP head. Left out: a native `dense_linear`;
`sampled_token` in the reference and on a GPU, where it returns None and transformers' warpers decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.kernels import reference as _reference
from specdec.kernels.abi import ACTIVATIONS, Work
from specdec.kernels.blocks import BlockTensor, pack_blocks, unpack_blocks, unpack_sub
from specdec.kernels.draft import DraftParts, FusedDraft
from specdec.kernels.forms import BLOCK, GROUP, HALF, TABLES, BlockForm
from specdec.kernels.layers import FusedLayers, FusedPiece, LayerWeights, Span, StoreRows, fits
from specdec.kernels.libraries import (
    CHOICES,
    active,
    arithmetic,
    choose,
    count_uncaptured,
    differentiable_library,
    free_graphs,
    graph_counts,
    interpreted,
    invariant,
    library_of,
    meet_stores,
    missing,
)
from specdec.kernels.low_rank import LowRank, pack_low_rank
from specdec.kernels.native import Native
from specdec.kernels.records import (
    AdapterRecords,
    DraftSampling,
    Matrix,
    MixtureWeights,
    adapter_records,
    plain,
)
from specdec.kernels.store import KeyFromValue, KVView

if TYPE_CHECKING:  # Triton is imported where a GPU is first met
    from specdec.kernels.triton.passes.draft import DeviceDraft
    from specdec.kernels.triton.passes.layers import DeviceLayers

__all__ = [
    "BLOCK",
    "CHOICES",
    "GROUP",
    "HALF",
    "TABLES",
    "AdapterRecords",
    "BlockForm",
    "BlockTensor",
    "DraftParts",
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
    "count_uncaptured",
    "dense_linear",
    "free_graphs",
    "fuse",
    "fuse_draft",
    "gated",
    "graph_counts",
    "interpreted",
    "invariant",
    "low_rank",
    "meet_stores",
    "missing",
    "pack_blocks",
    "pack_low_rank",
    "quantise_store",
    "read_kv",
    "rms_norm",
    "rope",
    "sampled_token",
    "unpack_blocks",
    "unpack_sub",
]


def fuse(layers: Sequence[LayerWeights[Any]], stores: Sequence[int], norm: Tensor) -> FusedLayers | DeviceLayers | None:
    """Make one call of `layers` and the norm after them (weight [hidden]): a native one, or a pass of a GPU.

    `stores`: for each layer the index of the K/V that it reads, and writes where it has `k`. None where op by op is the
    only way: no kernels in use, or some of Triton's that failed their check; on the CPU also weights that are not in
    blocks, and vectors that are not float32.
    """
    library = library_of(norm)
    if (make := getattr(library, "fuse", None)) is not None:
        passes: DeviceLayers | None = make(layers, stores, norm, lambda: library_of(norm) is library)
        return passes
    if not isinstance(library, Native) or not plain(norm) or not all(map(fits, layers)):
        return None
    return FusedLayers(library, layers, stores, norm, lambda: library_of(norm) is library)


def fuse_draft(layers: FusedLayers | DeviceLayers | None, parts: DraftParts) -> FusedDraft | DeviceDraft | None:
    """Make one call for all steps of a draft, of fused `layers` and the `parts` of a draft head around them.

    None where step by step is the only way, as in `fuse`.
    """
    if layers is None or any(blocks is None for blocks in parts.blocks):
        return None
    if not isinstance(layers, FusedLayers):
        make = getattr(library_of(layers.norm), "fuse_draft", None)
        drafts: DeviceDraft | None = make and make(layers, parts)
        return drafts
    return FusedDraft(layers, parts) if all(b is not None and b.q.is_cpu for b in parts.blocks) else None


def block_linear(x: Tensor, w: BlockTensor) -> Tensor:
    """Multiply x [T, K], float32, bfloat16 or float16, by packed weights [N, K] -> [T, N] in x.dtype."""
    if x.dim() != 2 or x.shape[1] != w.columns:
        raise ValueError(f"x must be [T, {w.columns}] for weights [{w.rows}, {w.columns}]: {tuple(x.shape)}")
    out: Tensor = library_of(x, w.q).block_linear(x, w)
    return out


def block_rows(ids: Tensor, w: BlockTensor, dtype: torch.dtype) -> Tensor:
    """Dequantise rows of packed weights, as of an embedding: ids long [T] -> [T, K] in dtype.

    Raises IndexError for an id that is not a row.
    """
    out: Tensor = library_of(ids, w.q).block_rows(ids, w, dtype)
    return out


def best(x: Tensor) -> tuple[float, int]:
    """Return the largest of x [n] (n > 0) and the first index that has it; a NaN wins, wherever it is."""
    found: tuple[float, int] = library_of(x).best(x)
    return found


def gumbel_candidates(scores: Tensor, top: float, floor: float, key: int, ids: Tensor | None = None) -> Tensor:
    """Return the indices, ascending, of the tokens that can have the largest sum of score and noise: long [n].

    `scores` [candidates], the largest of them `top`; nothing at or below `floor` can win. `key`: of the noise at the
    position (see `specdec.engine.sampling.gumbel`), which is not added here; `ids` [candidates] int64, contiguous: the
    candidates' token ids, None where those are their indices.
    """
    found: Tensor = library_of(scores).gumbel_candidates(scores, top, floor, key, ids)
    return found


def sampled_token(
    logits: Tensor, key: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> int | None:
    """Return the token of `logits` [vocab] with the largest sum of score and noise of `key`, after transformers'
    warpers of these names in this order.

    None where the warpers have to be called: where rounding could change the token, where a logit is NaN or the largest
    is infinite, after sixteen dropped winners, for a `min_p` below 1e-6, and without the native library. `temperature`
    is above 0; `top_k` 0, `top_p` 1 and `min_p` 0 leave the warper out.
    """
    library = library_of(logits)
    if not isinstance(library, Native):
        return None
    return library.sampled_token(logits, key, temperature, top_k, top_p, min_p)


def low_rank(x: Tensor, part: LowRank) -> Tensor:
    """Multiply x [T, K] by a low-rank part of a matrix [N, K] -> [T, N] in x.dtype, to be added to the product."""
    if x.dim() != 2 or x.shape[1] != part.inputs:
        raise ValueError(f"x must be [T, {part.inputs}] for a low-rank part of so many inputs: {tuple(x.shape)}")
    out: Tensor = library_of(x, part.down).low_rank(x, part)
    return out


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [T, K] by w [N, K] and add bias [N] -> [T, N] in x.dtype."""
    out: Tensor = library_of(x, w, bias).dense_linear(x, w, bias)
    return out


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
    out: Tensor = differentiable_library(q, *kv.tensors()).attention(q, kv, lo, hi, scale)
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm x [..., D]: x / sqrt(mean(x^2) + eps), times weight [D], in float32, then in x.dtype."""
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {tuple(weight.shape)}")
    out: Tensor = differentiable_library(x, weight).rms_norm(x, weight, eps)
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by cos and sin [T, D], halves convention -> [T, H, D]."""
    expected = (x.shape[0], x.shape[2])
    if cos.shape != expected or sin.shape != expected or x.shape[2] % 2:
        raise ValueError(f"cos and sin must be [T, D] = {expected}, D even: {cos.shape}, {sin.shape}")
    out: Tensor = differentiable_library(x, cos, sin).rope(x, cos, sin)
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute activation(gate) * up, both [T, I]; activation is "silu" or "gelu_tanh"."""
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    library = differentiable_library(gate, up) if activation in ACTIVATIONS else _reference  # which refuses any other
    out: Tensor = library.gated(gate, up, activation)
    return out
