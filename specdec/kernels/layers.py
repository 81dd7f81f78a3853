"""Whole decoder layers in one native call (stack.h).

A decoder layer op by op is some forty calls, and a call costs two to five microseconds before it does anything: on a
135M model that is more than reading the weights takes. The records here say where a layer's weights are; the native
code walks them, and writes K and V to the stores as `specdec.cache` would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import Array, Structure, addressof, c_float, c_int64, c_void_p
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.kernels.blocks import BlockTensor
from specdec.kernels.native import Native
from specdec.kernels.records import STORE_TYPES, Store, plain, store_of
from specdec.kernels.store import KVView

Views = Sequence[KVView | None]


@dataclass(frozen=True)
class Matrix:
    """Packed weights [out, in] (None: they are stored otherwise) and an optional bias [out]."""

    blocks: BlockTensor | None
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; what it lacks is None. See `specdec.model.stack.Layer` for what each field does.

    `kind`: whose rotations and row bounds it uses. `store`: index of the K/V it reads (and writes, when it has `k`).
    """

    kind: str
    store: int
    heads: int
    kv_heads: int
    head_dim: int
    gelu: bool
    norm_values: bool
    eps: float
    scale: float
    q: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    input_norm: Tensor
    mlp_norm: Tensor
    k: Matrix | None = None
    v: Matrix | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    extra_gate: Matrix | None = None
    extra_projection: Matrix | None = None
    extra_norm: Tensor | None = None
    scalar: Tensor | None = None

    @property
    def fits(self) -> bool:
        """Whether the native code can run it: blocks and float32 vectors, all on the CPU."""
        parts = [part for f in fields(self) if (part := getattr(self, f.name)) is not None]
        matrices = [part for part in parts if isinstance(part, Matrix)]
        vectors = [part for part in parts if isinstance(part, Tensor)]
        vectors += [matrix.bias for matrix in matrices if matrix.bias is not None]
        return all(m.blocks is not None and m.blocks.q.is_cpu for m in matrices) and all(map(plain, vectors))


@dataclass(frozen=True)
class Span:
    """Where the rows of a pass are, for the layers of one kind.

    `cos`, `sin` [T, head_dim]; row t sees positions first[t] .. end[t] - 1, and layers that store K/V put its own at
    position end[t] - 1.
    """

    cos: Tensor
    sin: Tensor
    first: Sequence[int]
    end: Sequence[int]

    def part(self, rows: slice) -> Span:
        """Some of the rows."""
        return Span(self.cos[rows], self.sin[rows], self.first[rows], self.end[rows])


class TextRows(NamedTuple):
    """How many rows of one text, and its cache's stores: the same object until one of them changes (None: not read)."""

    rows: int
    views: Views


class MatrixRecord(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "scale", "minimum")),
        *((name, c_int64) for name in ("blocks", "bits")),
        ("bias", c_void_p),
        ("outputs", c_int64),
    )


_MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "extra_gate", "extra_projection")
_VECTORS = ("input_norm", "q_norm", "k_norm", "attention_norm", "mlp_norm", "mlp_post_norm", "extra_norm", "scalar")
_COUNTS = ("heads", "kv_heads", "head_dim", "kind", "store", "gelu", "norm_values")


class _Layer(Structure):
    _fields_ = (
        *((name, MatrixRecord) for name in _MATRICES),
        *((name, c_void_p) for name in _VECTORS),
        *((name, c_int64) for name in _COUNTS),
        ("eps", c_float),
        ("scale", c_float),
    )


class _Span(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("cos", "sin", "first", "end"))


class _Tables(threading.local):
    """Where the stores of the texts of the last pass are; each thread decodes texts of its own."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Views, Array[Store]]] = {}


class FusedLayers:
    """A stack of layers, and the norm after it, that runs in one call. Made by `specdec.kernels.fuse`.

    `library`, `records`, `norm`, `stores` and `spans` are what such a call takes; a draft's (draft.py) takes them too.
    """

    def __init__(
        self, library: Native, layers: Sequence[LayerWeights], norm: Tensor, in_use: Callable[[], bool]
    ) -> None:
        assert all(layer.fits for layer in layers)
        self.norm = norm
        self.library, self._in_use = library, in_use
        self._kinds = tuple(dict.fromkeys(layer.kind for layer in layers))
        self._weights = tuple(layers)  # the structures below point into these
        self.records = (_Layer * len(layers))(*(self._layer(layer) for layer in layers))
        self._tables = _Tables()

    def __call__(
        self,
        x: Tensor,
        spans: Mapping[str, Span],
        texts: Sequence[TextRows],
        extra: Tensor | None = None,
        aux_layers: Sequence[int] = (),
    ) -> Tensor:
        """Rows x [T, hidden] float32 through all layers and the norm after them, in place; returns x, followed by what
        leaves `aux_layers`: [T, (1 + their count) * hidden].

        `texts`: whose rows these are, in their order. `extra` [T, layers, width] float32: per-layer inputs of the
        layers that want them.
        """
        rows = x.shape[0]
        assert sum(text.rows for text in texts) == rows
        starts = (c_int64 * (len(texts) + 1))(0, *accumulate(text.rows for text in texts))
        stores, (table, _kept) = self.stores(texts), self.spans(spans, rows)
        if extra is not None:
            extra = extra.contiguous()
        if not aux_layers:
            self.library.layers(self.records, table, starts, stores, self.norm, x, extra)
            return x
        outputs = {layer: torch.empty_like(x) for layer in aux_layers}
        wanted = (c_void_p * len(self.records))(
            *(outputs[i].data_ptr() if i in outputs else None for i in range(len(self.records)))
        )
        self.library.layers(self.records, table, starts, stores, self.norm, x, extra, wanted)
        return torch.cat((x, *(outputs[layer] for layer in aux_layers)), dim=1)

    def stores(self, texts: Sequence[TextRows]) -> Array[c_void_p]:
        """Where each text's stores are."""
        # Kept as long as they are in use: to make a text's table anew costs as much as a small pass.
        self._tables.kept = {id(text.views): self._table(text.views) for text in texts}
        return (c_void_p * len(texts))(*(addressof(self._tables.kept[id(text.views)][1]) for text in texts))

    def spans(self, spans: Mapping[str, Span], rows: int) -> tuple[Array[_Span], list[Any]]:
        """The table of spans, and what has to live as long as it does."""
        bounds = c_int64 * rows
        kept: list[Any] = []
        table = (_Span * len(self._kinds))()
        for entry, kind in zip(table, self._kinds, strict=True):
            span = spans[kind]
            first, end = bounds(*span.first), bounds(*span.end)
            cos, sin = span.cos.contiguous(), span.sin.contiguous()
            assert plain(cos) and plain(sin)
            kept.append((first, end, cos, sin))
            entry.cos, entry.sin = cos.data_ptr(), sin.data_ptr()
            entry.first, entry.end = addressof(first), addressof(end)
        return table, kept

    def _table(self, views: Views) -> tuple[Views, Array[Store]]:
        """`views`, so that they live, and the structures that point into them."""
        if (known := self._tables.kept.get(id(views))) is not None:
            return known
        return views, (Store * len(views))(*(Store() if v is None else store_of(v) for v in views))

    def usable(self, texts: Iterable[Views]) -> bool:
        """Return whether this call can make a pass of `texts`: the native kernels are still the ones in use, no
        gradients are wanted, and the stores of each text, which are all of one type, are of one that they read."""
        if not self._in_use() or torch.is_grad_enabled():
            return False
        return all(next(view for view in views if view is not None).values.dtype in STORE_TYPES for views in texts)

    def _layer(self, layer: LayerWeights) -> _Layer:
        made = _Layer(eps=layer.eps, scale=layer.scale)
        for name in _MATRICES:
            if (matrix := getattr(layer, name)) is not None:
                setattr(made, name, matrix_record(matrix))
        for name in _VECTORS:
            if (vector := getattr(layer, name)) is not None:
                setattr(made, name, vector.data_ptr())
        for name in _COUNTS:
            value = getattr(layer, name)
            setattr(made, name, self._kinds.index(value) if name == "kind" else int(value))
        return made


def matrix_record(matrix: Matrix) -> MatrixRecord:
    w = matrix.blocks
    assert w is not None and w.q.is_cpu and (matrix.bias is None or plain(matrix.bias))
    return MatrixRecord(
        q=w.q.data_ptr(),
        scale=w.scale.data_ptr(),
        minimum=None if w.minimum is None else w.minimum.data_ptr(),
        blocks=w.columns // 32,
        bits=w.bits,
        bias=None if matrix.bias is None else matrix.bias.data_ptr(),
        outputs=w.rows,
    )
