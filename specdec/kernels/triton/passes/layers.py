"""Whole decoder layers on a GPU: the launches of a pass, in the order of the layers.

The arithmetic is that of the layers op by op (`specdec.model.stack`), to the bit: norms are fused with what reads them,
and gate, up and activation with each other, where the matrices are in blocks that the kernels read. Other matrices, and
mixtures of experts, go through their own call, which is a kernel of this package, too. A pass makes the same launches
whatever the positions of its rows, so that it can be captured (`graphs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.abi import Work
from specdec.kernels.blocks import BlockTensor
from specdec.kernels.forms import BlockForm
from specdec.kernels.layers import LayerWeights, Span, StoreRows, Views
from specdec.kernels.store import KVView
from specdec.kernels.triton.append import norm_rope, norm_rope_append
from specdec.kernels.triton.attention import STORE_TYPES, attention
from specdec.kernels.triton.norm import add_norm_quantise, norm_quantise, rms_norm
from specdec.kernels.triton.passes.graphs import MOST_ROWS, Graphs
from specdec.kernels.triton.passes.places import Places, from_tensors, to_tensors
from specdec.kernels.triton.product import block_product, gated_product
from specdec.kernels.triton.quantise import Quantised
from specdec.kernels.triton.rows import gated

Reads = Callable[[BlockForm], bool]


@dataclass(frozen=True)
class Normed:
    """Hold rows that were normed for some matrices: as numbers, or as blocks where all of the matrices read blocks."""

    rows: Tensor | None
    blocks: Quantised | None
    dtype: torch.dtype

    def times(self, part: Any) -> Tensor:
        """Return the rows [T, in] times the transpose of the matrix of `part`, with its bias: [T, out]."""
        if self.blocks is None:
            out: Tensor = part(self.rows)
            return out
        matrix = part.matrix
        y = block_product(self.blocks, matrix.blocks, self.dtype)
        return y if matrix.bias is None else y + matrix.bias


@dataclass(frozen=True)
class DeviceLayer:
    """Keep a layer, and which of its matrices read quantised rows: those of the attention (`attends`), gate and up
    (`gates`), and these two in one product with the activation (`gates_at_once`)."""

    weights: LayerWeights[Any]
    attends: bool
    gates: bool
    gates_at_once: bool

    @classmethod
    def of(cls, layer: LayerWeights[Any], reads: Reads) -> DeviceLayer:
        """Return `layer` with what its matrices read. `reads(form)`: whether kernels read blocks of a form."""

        def all_read(*parts: Any) -> bool:
            found = [part.matrix.blocks if part.low_rank is None else None for part in parts if part is not None]
            return all(blocks is not None and reads(blocks.form) for blocks in found)

        gates = all_read(layer.gate, layer.up)
        plain = gates and layer.gate.matrix.bias is None and layer.up.matrix.bias is None
        alike = plain and _kind(layer.gate.matrix.blocks) == _kind(layer.up.matrix.blocks)
        return cls(layer, all_read(layer.q, layer.k, layer.v), gates, alike)

    def normed(self, x: Tensor) -> Normed:
        """Norm x [T, hidden] for the attention."""
        layer = self.weights
        if self.attends:
            return Normed(None, norm_quantise(x, layer.input_norm, layer.eps), x.dtype)
        return Normed(rms_norm(x, layer.input_norm, layer.eps), None, x.dtype)

    def gated(self, normed: Normed) -> Tensor:
        """Return activation(gate) * up of normed rows: [T, I]."""
        layer = self.weights
        if not self.gates_at_once or normed.blocks is None:
            return gated(normed.times(layer.gate), normed.times(layer.up), layer.activation)
        gate, up = layer.gate.matrix.blocks, layer.up.matrix.blocks
        return gated_product(normed.blocks, gate, up, layer.activation, normed.dtype)


class DeviceLayers:
    """Run a stack of layers on a GPU, and the norm after it, with the face of `FusedLayers`. `specdec.kernels.fuse`
    makes the objects."""

    def __init__(
        self,
        layers: Sequence[LayerWeights[Any]],
        stores: Sequence[int],
        norm: Tensor,
        in_use: Callable[[], bool],
        reads: Reads,
        keeps: Callable[[KVView, torch.dtype], bool],
        graphs: Graphs,
    ) -> None:
        """Take `layers`, the store that each reads, by number, and the weight [hidden] of the norm after the last.
        `in_use()`: whether Triton's kernels run there now; `reads(form)`: whether they read blocks of a form;
        `keeps(view, rows)`: whether they read and write stores like that one, for rows of that type."""
        self.layers = tuple(DeviceLayer.of(layer, reads) for layer in layers)
        self.stores, self.norm, self.graphs = tuple(stores), norm, graphs
        self.kinds = tuple(dict.fromkeys(layer.spec.kind for layer in layers))
        self._in_use, self._keeps, self._kept = in_use, keeps, dict[torch.dtype, bool]()
        # A mixture asks which experts its rows use, and waits for the answer: no capture allows that.
        self.capturable = all(layer.experts is None for layer in layers)

    def usable(self, texts: Iterable[Views]) -> bool:
        """Return whether this object can make a pass of texts with these stores: while the kernels are in use and hold
        for all of them, and no gradients are wanted."""
        if not self._in_use() or torch.is_grad_enabled():
            return False
        return all(self._reads_and_writes(views) for views in texts)

    def _reads_and_writes(self, views: Views) -> bool:
        """Return whether the kernels hold for the stores of a text. Asked in every pass, so known by their type: the
        layers say all else of them."""
        dtype = next(view for view in views if view is not None).values.dtype
        if dtype not in self._kept:
            known = dtype in STORE_TYPES
            self._kept[dtype] = known and all(self._keeps(view, self.norm.dtype) for view in views if view is not None)
        return self._kept[dtype]

    def __call__(
        self,
        x: Tensor,
        spans: Mapping[str, Span],
        texts: Sequence[StoreRows],
        extra: Tensor | None = None,
        aux_layers: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        """Take rows x [T, hidden] through all layers and the norm after them; return them, and the rows as they leave
        each of `aux_layers`, [T, hidden] each. Arguments as of `FusedLayers`; no text has an adapter."""
        views = [(text.rows, text.views) for text in texts]
        wanted, given = tuple(aux_layers), () if extra is None else (extra,)

        def launches(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *tensors = inputs
            extra = tensors.pop() if given else None
            last, outputs = self.run(x, from_tensors(self.kinds, views, tensors), extra, wanted)
            return last, *(outputs[layer] for layer in wanted)

        inputs = (x, *to_tensors({kind: spans[kind] for kind in self.kinds}, texts, x.device), *given)
        key = (id(self), tuple(text.rows for text in texts), wanted)
        captured = self.capturable and x.shape[0] <= MOST_ROWS
        reads = [self, *(view for _, of_text in views for view in of_text if view is not None)]
        return self.graphs.run("pass", key, reads, inputs, launches, captured)

    def run(
        self, x: Tensor, places: Places, extra: Tensor | None = None, wanted: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Launch all layers over x [T, hidden], and the norm; return the rows, and those that leave layers `wanted`."""
        outputs = {}
        normed = self.layers[0].normed(x)
        for i in range(len(self.layers)):
            q = self._write(i, normed, places, Work.ALL)
            assert q is not None
            x, following = self._rest(i, x, q, places, None if extra is None else extra[:, i])
            if i in wanted:
                outputs[i] = x
            if i + 1 < len(self.layers):
                normed = following or self.layers[i + 1].normed(x)
        return rms_norm(x, self.norm, self.layers[-1].weights.eps), outputs

    def piece(
        self, x: Tensor, spans: Mapping[str, Span], texts: Sequence[StoreRows], extra: Tensor | None = None
    ) -> DevicePiece:
        """Prepare some rows of a pass, which goes through the layers piece by piece; arguments as in a call of all
        layers."""
        tensors = to_tensors({kind: spans[kind] for kind in self.kinds}, texts, x.device)
        tensors = tuple(tensor.to(x.device, non_blocking=True) for tensor in tensors)
        places = from_tensors(self.kinds, [(text.rows, text.views) for text in texts], tensors)
        return DevicePiece(self, x, places, extra)

    def one(self, number: int, x: Tensor, places: Places, extra: Tensor | None, work: Work) -> Tensor:
        """Do `work` of the layer `number`; return the rows x [T, hidden] as they leave it, or x for `KEYS` alone."""
        q = self._write(number, self.layers[number].normed(x), places, work)
        return x if q is None else self._rest(number, x, q, places, extra)[0]

    def _write(self, number: int, normed: Normed, places: Places, work: Work) -> Tensor | None:
        """Store K and V of normed rows, where the layer `number` has its own, and return its queries [T, H, D]; for
        `KEYS` the first alone, for `REST` the second."""
        layer = self.layers[number].weights
        spec, span = layer.spec, places.spans[layer.spec.kind]
        q = None if work is Work.KEYS else normed.times(layer.q).view(-1, spec.heads, spec.head_dim)
        if layer.k is None or work is Work.REST:
            return None if q is None else norm_rope(q, layer.q_norm, layer.eps, span.cos, span.sin)
        k = normed.times(layer.k).view(-1, spec.kv_heads, spec.head_dim)  # [T, Hkv, D]
        v = k if layer.v is None else normed.times(layer.v).view(-1, spec.kv_heads, spec.head_dim)
        turned = [
            norm_rope_append(
                self._view(number, places, i),
                text.start,
                None if q is None else q[text.rows],
                k[text.rows],
                v[text.rows],
                layer.q_norm,
                layer.k_norm,
                layer.eps,
                span.cos[text.rows],
                span.sin[text.rows],
                norm_values=layer.norm_values,
            )
            for i, text in enumerate(places.texts)
        ]
        return None if q is None else _together(turned)

    def _rest(
        self, number: int, x: Tensor, q: Tensor, places: Places, extra: Tensor | None
    ) -> tuple[Tensor, Normed | None]:
        """Attend with queries q [T, H, D] and go through the MLP; return the rows [T, hidden], and the same normed for
        the next layer, where a kernel has done that with what was before."""
        layer, last = self.layers[number].weights, number + 1 == len(self.layers)
        y = layer.o(self._attended(number, q, places))
        x, normed = _added(x, y, layer.attention_post_norm, layer.mlp_norm, layer.eps, self.layers[number].gates)
        y = layer.down(self.layers[number].gated(normed))
        if layer.experts is not None:
            experts: Any = layer.experts
            y = experts(x, y)
        if layer.ple_gate is None and not last and self.layers[number + 1].attends:
            norm = self.layers[number + 1].weights.input_norm
            return _added(x, y, layer.mlp_post_norm, norm, layer.eps, True, layer.scalar)
        x = x + _post(y, layer.mlp_post_norm, layer.eps)
        if layer.ple_gate is not None:
            assert layer.ple_projection is not None and extra is not None
            y = gated(layer.ple_gate(x), extra.contiguous(), layer.activation)  # [T, per_layer_input]
            x = x + _post(layer.ple_projection(y), layer.ple_norm, layer.eps)
        return x if layer.scalar is None else x * layer.scalar, None

    def _attended(self, number: int, q: Tensor, places: Places) -> Tensor:
        """Attend with queries q [T, H, D]: [T, H * D]."""
        layer = self.layers[number].weights
        span = places.spans[layer.spec.kind]
        parts = [
            attention(
                q[text.rows], self._view(number, places, i), span.first[text.rows], span.end[text.rows], layer.scale
            )
            for i, text in enumerate(places.texts)
        ]
        return _together(parts).flatten(1)

    def _view(self, number: int, places: Places, text: int) -> KVView:
        view = places.texts[text].views[self.stores[number]]
        assert view is not None
        return view


@dataclass(frozen=True)
class DevicePiece:
    """Take some rows of a pass through one layer at a time. `rows` [T, hidden]: changed in place, and never normed."""

    layers: DeviceLayers
    rows: Tensor
    places: Places
    extra: Tensor | None

    def __call__(self, number: int, work: Work) -> None:
        """Do `work` of the layer `number`."""
        extra = None if self.extra is None else self.extra[:, number]
        found = self.layers.one(number, self.rows, self.places, extra, work)
        if work is not Work.KEYS:
            self.rows.copy_(found)


def _kind(blocks: BlockTensor) -> tuple[object, ...]:
    return blocks.form, blocks.table, blocks.rows


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _added(
    x: Tensor, y: Tensor, post: Tensor | None, weight: Tensor, eps: float, blocks: bool, scalar: Tensor | None = None
) -> tuple[Tensor, Normed]:
    """Add y, normed with `post` where there is one, to x [T, hidden], times `scalar`; return that, and it normed, as
    `blocks` or as numbers."""
    if blocks:
        x, quantised = add_norm_quantise(x, y, post, weight, eps, scalar)
        return x, Normed(None, quantised, x.dtype)
    assert scalar is None
    x = x + _post(y, post, eps)
    return x, Normed(rms_norm(x, weight, eps), None, x.dtype)


def _post(y: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return y if weight is None else rms_norm(y, weight, eps)
