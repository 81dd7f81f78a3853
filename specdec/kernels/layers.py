"""Whole decoder layers in one native call (csrc/stack.h).

A decoder layer op by op is some forty calls, and a call costs two to five microseconds before it does anything: on a
135M model that is more than reading the weights takes. The records here say where a layer's weights are; the native
code walks them, and writes K and V to the stores as `specdec.cache` would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from ctypes import Array, addressof, c_int64, c_void_p, pointer
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from specdec.kernels import abi
from specdec.kernels.low_rank import LowRank
from specdec.kernels.native import Native
from specdec.kernels.records import (
    STORE_TYPES,
    AdapterRecords,
    CallbackErrors,
    Matrix,
    MixtureWeights,
    adapter_pointers,
    address,
    matrix_record,
    mixture_record,
    plain,
    store_record,
)
from specdec.kernels.store import KVView

Views = Sequence[KVView | None]


class Packed(Protocol):
    """Have a matrix in the form that the kernels read."""

    @property
    def matrix(self) -> Matrix:
        """Return the blocks and the bias."""

    @property
    def low_rank(self) -> LowRank | None:
        """Return what an adapter adds to the matrix."""


class LayerShape(Protocol):
    """Give the shape of a layer's attention. `kind`: whose rotations and row bounds the layer uses."""

    @property
    def kind(self) -> str:
        """Return the kind of attention, a key of the spans."""

    @property
    def heads(self) -> int:
        """Return the number of query heads."""

    @property
    def kv_heads(self) -> int:
        """Return the number of K/V heads."""

    @property
    def head_dim(self) -> int:
        """Return the width of a head."""


Linear = TypeVar("Linear", bound=Packed)


@dataclass(frozen=True, kw_only=True)
class LayerWeights(Generic[Linear]):
    """Hold one decoder layer: attention and a gated MLP around a residual stream of [T, hidden].

    `scale` multiplies q @ k. `k`, `v` and `k_norm` are None in a layer that reads another layer's K/V; `v` also where V
    is made from k_proj's output. `norm_values` says whether V is normed. Norms are weights [width] in the compute
    dtype, None where the family has none. `ple_*`: the gated projection of a per-layer input (Gemma 4 E2B). `scalar`
    [1] multiplies the layer's output. `experts`: the mixture beside the MLP; None where the layer has none.
    """

    spec: LayerShape
    eps: float
    scale: float
    activation: str
    input_norm: Tensor
    q: Linear
    o: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear
    k: Linear | None = None
    v: Linear | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_values: bool = False
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    ple_gate: Linear | None = None
    ple_projection: Linear | None = None
    ple_norm: Tensor | None = None
    scalar: Tensor | None = None
    experts: MixtureWeights | None = None


_MATRICES = [field[0] for field in abi.Layer._fields_ if field[1] is abi.Matrix]
_VECTORS = [field[0] for field in abi.Layer._fields_ if field[1] is c_void_p]


def fits(layer: LayerWeights[Any]) -> bool:
    """Return whether the library can run `layer`: packed matrices and float32 vectors, all on the CPU."""
    matrices = [part.matrix for name in _MATRICES if (part := getattr(layer, name)) is not None]
    vectors = [part for name in _VECTORS if (part := getattr(layer, name)) is not None]
    vectors += [matrix.bias for matrix in matrices if matrix.bias is not None]
    packed = all(matrix.blocks is not None and matrix.blocks.q.is_cpu for matrix in matrices)
    mixture = layer.experts is None or layer.experts.readable
    return packed and mixture and all(map(plain, vectors)) and layer.activation in abi.ACTIVATIONS


@dataclass(frozen=True)
class Span:
    """Place the rows of a pass, for the layers of one kind.

    `cos`, `sin` [T, head_dim], of the rows' own positions; row t sees positions first[t] .. end[t] - 1. A row of a
    picture sees later rows of the picture in sliding layers, so `end` says nothing of where the row itself is.
    """

    cos: Tensor
    sin: Tensor
    first: Sequence[int]
    end: Sequence[int]

    def part(self, rows: slice) -> Span:
        """Return the span of some of the rows."""
        return Span(self.cos[rows], self.sin[rows], self.first[rows], self.end[rows])


class StoreRows(NamedTuple):
    """Count the rows of one text, and name its cache's stores (None: not read).

    `views` stays the same object until a store changes. `start`: the position of the first row. `adapter`: the
    `adapter_records` of the layers that the text goes through; None: it has no adapter.
    """

    rows: int
    views: Views
    start: int
    adapter: AdapterRecords | None = None


class _Tables(threading.local):
    """Keep the records of the stores of the last pass's texts; each thread decodes texts of its own."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Views, Array[abi.KV]]] = {}


@dataclass(frozen=True)
class FusedPiece:
    """Take some rows of a pass through one layer at a time. `rows` [T, hidden]: changed in place, and never normed."""

    layers: FusedLayers
    rows: Tensor
    arguments: tuple[Array[Any], Array[Any], Array[Any], Array[Any]]
    extra: Tensor | None
    adapters: Sequence[AdapterRecords | None]
    kept: object  # what the records in `arguments` point into

    def __call__(self, number: int, work: abi.Work) -> None:
        """Do `work` of the layer `number`."""
        record = (abi.Layer * 1)(self.layers.records[number])
        extra = None if self.extra is None else self.extra[:, number : number + 1].contiguous()  # [T, 1, width]
        adapters = adapter_pointers(self.adapters, number)
        self.layers.run(record, *self.arguments, adapters, None, self.rows, extra, work=work)


class FusedLayers:
    """Run a stack of layers, and the norm after it, in one native call. `specdec.kernels.fuse` makes the objects.

    `library`, `records`, `norm`, `stores` and `spans` are the arguments of a call, and of a draft's call (draft.py)
    too.
    """

    def __init__(
        self,
        library: Native,
        layers: Sequence[LayerWeights[Any]],
        stores: Sequence[int],
        norm: Tensor,
        in_use: Callable[[], bool],
    ) -> None:
        """Point a record at each layer. `stores`: for each layer the store that it reads, by number; `norm` [hidden]:
        weight after the last layer; `in_use()`: whether the native kernels run now."""
        assert all(map(fits, layers))
        self.norm = norm
        self.library, self._in_use = library, in_use
        self._kinds = tuple(dict.fromkeys(layer.spec.kind for layer in layers))
        self._weights = tuple(layers)  # the records below point into these
        self._mixtures: list[abi.Mixture] = []  # and into these
        self._errors = CallbackErrors()  # of `use` of the mixtures
        self.records = (abi.Layer * len(layers))(*map(self._record, layers, stores))
        self._tables = _Tables()

    def __call__(
        self,
        x: Tensor,
        spans: Mapping[str, Span],
        texts: Sequence[StoreRows],
        extra: Tensor | None = None,
        aux_layers: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        """Take rows x [T, hidden] float32 through all layers and the norm after them, in place.

        Returns x, and the rows as they leave each of `aux_layers`, [T, hidden] each.

        `texts`: whose rows these are, in their order. `extra` [T, layers, width] float32: per-layer inputs of the
        layers that want them.
        """
        places = self._places(texts, x.shape[0])
        stores, (table, _kept) = self.stores([text.views for text in texts]), self.spans(spans, x.shape[0])
        adapters = adapter_pointers([text.adapter for text in texts])
        if extra is not None:
            extra = extra.contiguous()
        if not aux_layers:
            self.run(self.records, table, *places, stores, adapters, self.norm, x, extra)
            return (x,)
        outputs = {layer: torch.empty_like(x) for layer in aux_layers}
        wanted = (c_void_p * len(self.records))(
            *(outputs[i].data_ptr() if i in outputs else None for i in range(len(self.records)))
        )
        self.run(self.records, table, *places, stores, adapters, self.norm, x, extra, wanted)
        return x, *(outputs[layer] for layer in aux_layers)

    def run(self, *arguments: Any, **options: Any) -> None:
        """Call `Native.layers`, and raise what a mixture's `use` raised first meanwhile."""
        with self._errors.raised() if self._mixtures else nullcontext():
            self.library.layers(*arguments, **options)

    def piece(
        self, x: Tensor, spans: Mapping[str, Span], texts: Sequence[StoreRows], extra: Tensor | None = None
    ) -> FusedPiece:
        """Prepare some rows of a pass, which goes through the layers piece by piece; arguments as in a call of all
        layers."""
        stores, (table, kept) = self.stores([text.views for text in texts]), self.spans(spans, x.shape[0])
        starts, positions = self._places(texts, x.shape[0])
        arguments = table, starts, positions, stores
        adapters = [text.adapter for text in texts]
        return FusedPiece(self, x, arguments, extra, adapters, (kept, self._tables.kept))

    def _places(self, texts: Sequence[StoreRows], rows: int) -> tuple[Array[c_int64], Array[c_int64]]:
        """Return the first row of each text, with the number of rows after them, and the position of each such row."""
        starts = (c_int64 * (len(texts) + 1))(0, *accumulate(text.rows for text in texts))
        assert starts[len(texts)] == rows
        return starts, (c_int64 * len(texts))(*(text.start for text in texts))

    def stores(self, texts: Sequence[Views]) -> Array[c_void_p]:
        """Return the addresses of each text's stores."""
        # Kept as long as they are in use: to make a text's table anew costs as much as a small pass.
        self._tables.kept = {id(views): self._table(views) for views in texts}
        return (c_void_p * len(texts))(*(addressof(self._tables.kept[id(views)][1]) for views in texts))

    def spans(self, spans: Mapping[str, Span], rows: int) -> tuple[Array[abi.Span], list[Any]]:
        """Return the records of `spans`, and the objects that have to live as long as the records do."""
        bounds = c_int64 * rows
        kept: list[Any] = []
        table = (abi.Span * len(self._kinds))()
        for entry, kind in zip(table, self._kinds, strict=True):
            span = spans[kind]
            first, end = bounds(*span.first), bounds(*span.end)
            cos, sin = span.cos.contiguous(), span.sin.contiguous()
            assert plain(cos) and plain(sin)
            kept.append((first, end, cos, sin))
            entry.cos, entry.sin = cos.data_ptr(), sin.data_ptr()
            entry.first, entry.end = addressof(first), addressof(end)
        return table, kept

    def _table(self, views: Views) -> tuple[Views, Array[abi.KV]]:
        """Return `views`, which so live on, and the records that point into them."""
        if (known := self._tables.kept.get(id(views))) is not None:
            return known
        return views, (abi.KV * len(views))(*(abi.KV() if v is None else store_record(v) for v in views))

    def usable(self, texts: Iterable[Views]) -> bool:
        """Return whether this call can make a pass of `texts`.

        It can while the native kernels are in use, no gradients are wanted, and the kernels read the type of each
        text's stores, which have one type.
        """
        if not self._in_use() or torch.is_grad_enabled():
            return False
        return all(next(view for view in views if view is not None).values.dtype in STORE_TYPES for views in texts)

    def _record(self, layer: LayerWeights[Any], store: int) -> abi.Layer:
        spec = layer.spec
        record = abi.Layer(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            kind=self._kinds.index(spec.kind),
            store=store,
            activation=abi.ACTIVATIONS.index(layer.activation),
            norm_values=layer.norm_values,
            eps=layer.eps,
            scale=layer.scale,
        )
        for name in _MATRICES:
            if (linear := getattr(layer, name)) is not None:
                setattr(record, name, matrix_record(linear.matrix))
        for name in _VECTORS:
            setattr(record, name, address(getattr(layer, name)))
        if layer.experts is not None:
            self._mixtures.append(mixture_record(layer.experts, self._errors))
            record.experts = pointer(self._mixtures[-1])
        return record
