"""Decoder layers, and a stack of them: a backbone and a drafter are both built from these.

Everything is a row, there is no batch dimension; rows of several texts may share a pass. Weights are objects with
`linear` and `rows`: this module does not know how they are stored. Arithmetic lives in `specdec.kernels`, where every
op gives a row the same bits whatever the other rows are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from specdec import kernels
from specdec.cache import MAX_ROWS, KVCache, LayerStore
from specdec.kernels import AdapterRecords, FusedPiece, LayerWeights, LowRank, Matrix, Span, StoreRows, Work
from specdec.model.experts import Experts
from specdec.model.spec import LayerSpec, RopeSpec
from specdec.model.states import States
from specdec.weights.tensors import Weight

if TYPE_CHECKING:
    from specdec.kernels import FusedLayers
    from specdec.kernels.triton.passes.layers import DeviceLayers, DevicePiece

ROPE_BLOCK = 512  # positions whose rotations are made together
ROPE_BLOCKS = 16  # blocks of a kind that are kept: 2 MB each for heads of 512


@dataclass(frozen=True)
class Linear:
    """Hold a weight matrix [out, in] with an optional bias [out], and the low-rank part that an adapter adds to it."""

    weight: Weight
    bias: Tensor | None = None
    low_rank: LowRank | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [T, in] times the transpose of the matrix, with the bias: [T, out]."""
        y = self.weight.linear(x)  # [T, in] -> [T, out]
        y = y if self.bias is None else y + self.bias
        return y if self.low_rank is None else y + kernels.low_rank(x, self.low_rank)

    @property
    def matrix(self) -> Matrix:
        """Return the matrix in the form that native calls read."""
        return Matrix(self.weight.packed, self.bias)


@dataclass(frozen=True, kw_only=True)
class Layer(LayerWeights[Linear]):
    """Hold the parts of one decoder layer, under the names that the kernels know too, and compute it op by op."""

    spec: LayerSpec
    experts: Experts | None = None

    def __call__(
        self,
        x: Tensor,
        span: Span,
        store: LayerStore,
        start: int,
        per_layer_input: Tensor | None = None,
        work: Work = Work.ALL,
    ) -> Tensor:
        """Take rows [T, hidden] at positions start .. start + T - 1 through the layer; write their K/V if it has its
        own.

        `work` KEYS writes K/V and returns x; REST finds them written.
        """
        normed = kernels.rms_norm(x, self.input_norm, self.eps)
        if work is not Work.REST and self.k is not None:
            self._write(normed, span, store, start)
        if work is Work.KEYS:
            return x
        x = x + self._norm(self._attend(normed, span, store), self.attention_post_norm)
        y = kernels.rms_norm(x, self.mlp_norm, self.eps)
        y = self.down(kernels.gated(self.gate(y), self.up(y), self.activation))
        if self.experts is not None:
            y = self.experts(x, y)
        x = x + self._norm(y, self.mlp_post_norm)
        if self.ple_gate is not None:
            assert self.ple_projection is not None and per_layer_input is not None
            y = kernels.gated(self.ple_gate(x), per_layer_input, self.activation)  # [T, per_layer_input]
            x = x + self._norm(self.ple_projection(y), self.ple_norm)
        return x if self.scalar is None else x * self.scalar

    def _write(self, x: Tensor, span: Span, store: LayerStore, start: int) -> None:
        """Store K and V of normed rows x [T, hidden] at positions from `start` on."""
        rows, spec = x.shape[0], self.spec
        assert self.k is not None
        raw = self.k(x).view(rows, spec.kv_heads, spec.head_dim)  # [T, Hkv, D]
        v = raw if self.v is None else self.v(x).view(rows, spec.kv_heads, spec.head_dim)  # [T, Hkv, D]
        k = kernels.rope(self._norm(raw, self.k_norm), span.cos, span.sin)
        store.write(start, k, kernels.rms_norm(v, None, self.eps) if self.norm_values else v)

    def _attend(self, x: Tensor, span: Span, store: LayerStore) -> Tensor:
        """Attend with normed rows x [T, hidden]: [T, hidden]."""
        rows, spec = x.shape[0], self.spec
        q = self._norm(self.q(x).view(rows, spec.heads, spec.head_dim), self.q_norm)  # [T, H, D]
        q = kernels.rope(q, span.cos, span.sin)
        y = kernels.attention(q, store.view, span.first, span.end, self.scale)  # [T, H, D]
        return self.o(y.reshape(rows, spec.heads * spec.head_dim))  # [T, H * D] -> [T, hidden]

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else kernels.rms_norm(x, weight, self.eps)


@dataclass(frozen=True, eq=False)
class AdaptedLayers:
    """Hold layers with an adapter's parts. `records`: of native calls; None: it replaces matrices, and all goes op by
    op."""

    layers: tuple[Layer, ...]
    records: AdapterRecords | None


class Rotations:
    """Make rotary cos and sin per layer kind, for blocks of positions; the blocks that were used last are kept."""

    def __init__(self, ropes: Mapping[str, RopeSpec], dtype: torch.dtype, device: torch.device) -> None:
        self._ropes, self._dtype, self._device = ropes, dtype, device
        self._block = lru_cache(ROPE_BLOCKS * len(ropes))(self._made)
        self._rotating_tables: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, kind: str, texts: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, head_dim] for layers of `kind`: positions start .. start + rows - 1 of each (start,
        rows)."""
        parts = [
            tuple(table[low - index * ROPE_BLOCK : high - index * ROPE_BLOCK] for table in self._block(kind, index))
            for start, rows in texts
            for index, low, high in _pieces(start, start + rows)
        ]
        if len(parts) == 1:
            return parts[0][0], parts[0][1]
        return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])

    def rotating_tables(self, kind: str, positions: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin float32 [at least `positions`, n], from position 0 on, of the n pairs that turn at all.

        Proportional rope (Gemma 4's full layers) turns 64 pairs of 256: a table for every position of a long text then
        has an eighth of its full size.
        """
        count = self._ropes[kind].rotating_pairs
        known = self._rotating_tables.get(kind)
        made = 0 if known is None else known[0].shape[0]
        if known is None or made < positions:
            blocks = [self._made(kind, index) for index in range(made // ROPE_BLOCK, -(-positions // ROPE_BLOCK))]
            more = [torch.cat([block[i][:, :count].float() for block in blocks]) for i in (0, 1)]
            cos, sin = more if known is None else (torch.cat((old, new)) for old, new in zip(known, more, strict=True))
            known = self._rotating_tables[kind] = (cos, sin)
        return known

    def _made(self, kind: str, index: int) -> tuple[Tensor, Tensor]:
        # Always whole blocks of the same size: the tail of a vectorised cosine depends on the number of elements, and
        # a position's bits must not depend on the pass that first asked for it.
        rope = self._ropes[kind]
        frequencies = torch.tensor(rope.frequencies, dtype=torch.float32, device=self._device)  # [D / 2]
        positions = torch.arange(index * ROPE_BLOCK, (index + 1) * ROPE_BLOCK, dtype=torch.int64, device=self._device)
        angles = positions[:, None].float() * frequencies  # [ROPE_BLOCK, D / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [ROPE_BLOCK, D]
        return (angles.cos() * rope.factor).to(self._dtype), (angles.sin() * rope.factor).to(self._dtype)


def _pieces(low: int, high: int) -> list[tuple[int, int, int]]:
    """Return positions low .. high - 1 block by block: (block, first position, one past the last)."""
    return [
        (index, max(low, index * ROPE_BLOCK), min(high, (index + 1) * ROPE_BLOCK))
        for index in range(low // ROPE_BLOCK, -(-high // ROPE_BLOCK))
    ]


class Stack:
    """Run decoder layers one after the other, and the norm after the last: in one call where the kernels can, else op
    by op, to the same bits.

    A pass in which a text has more than `MAX_ROWS` rows goes through each layer in pieces of about as many rows: K and
    V of all pieces first, because rows of a picture see later ones, then the rest. Only the residual stream is then
    held for all rows. The bits are those of a pass without pieces.

    `stores`: for each layer the index of the K/V in the cache that it reads, and writes where it has a k_proj.
    """

    def __init__(self, layers: Sequence[Layer], stores: Sequence[int], norm: Tensor, eps: float) -> None:
        self.layers, self.stores, self.norm, self.eps = tuple(layers), tuple(stores), norm, eps
        assert all(layer.eps == eps for layer in layers)
        self._fused = kernels.fuse(self.layers, self.stores, norm)

    @property
    def fused(self) -> FusedLayers | DeviceLayers | None:
        """Return the layers as one call, where there is one; else None."""
        return self._fused

    def __call__(
        self,
        x: Tensor,
        spans: Mapping[str, Span],
        texts: Sequence[SequenceRows],
        extra: Tensor | None = None,
        aux_layers: Sequence[int] = (),
    ) -> States:
        """Take rows [T, hidden] of `texts`, one text after the other, through all layers and the norm.

        `extra` [T, layers, width]: per-layer inputs. Returns the states of the T rows, with the outputs of `aux_layers`
        (the residual stream).
        """
        pieces = pieces_of(texts)
        fused = self._fused
        if any(text.adapted is not None and text.adapted.records is None for text in texts):
            fused = None
        if fused is not None and not fused.usable(text.cache.views for text in texts):
            fused = None
        if fused is not None and len(pieces) == 1:
            last, *aux = fused(x, spans, [text.at_stores for text in texts], extra, aux_layers)
            return States(last, tuple(aux))
        kernels.count_uncaptured(x.device, "pass op-by-op" if fused is None else "pass eager")
        made: list[FusedPiece | DevicePiece | _OpByOp] = []
        for rows, cut in pieces:
            part = {kind: span.part(rows) for kind, span in spans.items()}
            per_layer = None if extra is None else extra[rows]
            if fused is None:
                made += [_OpByOp(self, *one) for one in _apart(x[rows], part, cut, per_layer)]
            else:
                made.append(fused.piece(x[rows], part, [text.at_stores for text in cut], per_layer))
        outputs = {}
        for i in range(len(self.layers)):
            for work in (Work.ALL,) if len(pieces) == 1 else (Work.KEYS, Work.REST):
                for piece in made:
                    piece(i, work)
            if i in aux_layers:
                outputs[i] = torch.cat([piece.rows for piece in made])
        last = torch.cat([piece.rows for piece in made]) if fused is None else x  # [T, hidden]; one call changes x
        return States(kernels.rms_norm(last, self.norm, self.eps), tuple(outputs[i] for i in aux_layers))


@dataclass
class _OpByOp:
    """Take rows [T, hidden] of one text through one layer at a time, op by op."""

    stack: Stack
    rows: Tensor
    spans: Mapping[str, Span]
    text: SequenceRows
    extra: Tensor | None

    def __call__(self, number: int, work: Work) -> None:
        """Do `work` of the layer `number`."""
        adapted = self.text.adapted
        layer = (self.stack if adapted is None else adapted).layers[number]
        store = self.text.cache.stores[self.stack.stores[number]]
        assert store is not None
        extra = None if self.extra is None else self.extra[:, number].contiguous()  # [T, width]
        self.rows = layer(self.rows, self.spans[layer.spec.kind], store, self.text.start, extra, work)


def _apart(
    x: Tensor, spans: Mapping[str, Span], texts: Sequence[SequenceRows], extra: Tensor | None
) -> Iterator[tuple[Tensor, Mapping[str, Span], SequenceRows, Tensor | None]]:
    """Yield the rows of each of `texts` with what belongs to them."""
    for text, end in zip(texts, accumulate(text.rows for text in texts), strict=True):
        part = slice(end - text.rows, end)
        cut = {kind: span.part(part) for kind, span in spans.items()}
        yield x[part], cut, text, None if extra is None else extra[part]


class SequenceRows(NamedTuple):
    """Hold the rows of one text in a pass: at positions start .. start + rows - 1 of `cache`, through the layers of
    `adapted` where the text has an adapter."""

    cache: KVCache
    start: int
    rows: int
    adapted: AdaptedLayers | None = None

    @property
    def at_stores(self) -> StoreRows:
        """Return the rows as native calls take them."""
        records = None if self.adapted is None else self.adapted.records
        return StoreRows(self.rows, self.cache.views, self.start, records)


class Piece(NamedTuple):
    """Hold some rows of a pass, and the texts that they belong to, with those of their rows that are among them."""

    rows: slice
    texts: list[SequenceRows]


def pieces_of(texts: Sequence[SequenceRows]) -> list[Piece]:
    """Cut a pass over the rows of `texts` into pieces: one, unless a text has more than `MAX_ROWS` rows.

    Pieces have a multiple of eight rows, as products take them, and at most half as many again as `MAX_ROWS`: a few
    rows over cost less in a longer piece than in one of their own, for which the weights are read once more.
    """
    total, longest = sum(text.rows for text in texts), max(text.rows for text in texts)
    count = 1 if longest <= MAX_ROWS else max(1, round(total / MAX_ROWS))
    if count == 1:
        return [Piece(slice(0, total), list(texts))]
    size = -(-total // (8 * count)) * 8
    return [_piece(texts, low, min(low + size, total)) for low in range(0, total, size)]


def _piece(texts: Sequence[SequenceRows], low: int, high: int) -> Piece:
    cut, end = [], 0
    for text in texts:
        begin, end = end, end + text.rows
        first, last = max(low, begin), min(high, end)
        if first < last:
            cut.append(SequenceRows(text.cache, text.start + first - begin, last - first, text.adapted))
    return Piece(slice(low, high), cut)
