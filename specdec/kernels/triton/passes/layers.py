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
from specdec.kernels.layers import LayerWeights, Span, StoreRows, Views
from specdec.kernels.triton.append import append, norm_rope
from specdec.kernels.triton.attention import attention
from specdec.kernels.triton.norm import add_norm_quantise, norm_quantise, rms_norm
from specdec.kernels.triton.passes.graphs import MOST_ROWS, Graphs
from specdec.kernels.triton.passes.places import DeviceSpan, Places, from_tensors, to_tensors
from specdec.kernels.triton.product import FORMS, Quantised, block_product, gated_product
from specdec.kernels.triton.rows import gated, rope

STORE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
Layer = LayerWeights[Any]


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


def reads_blocks(*parts: Any) -> bool:
    """Return whether all of `parts` (None: not there) have blocks of a form that the kernels read, and no adapter."""
    return all(
        part is None or (part.low_rank is None and (b := part.matrix.blocks) is not None and b.form in FORMS)
        for part in parts
    )


class DeviceLayers:
    """Run a stack of layers on a GPU, and the norm after it, with the face of `FusedLayers`. `specdec.kernels.fuse`
    makes the objects."""

    def __init__(
        self,
        layers: Sequence[Layer],
        stores: Sequence[int],
        norm: Tensor,
        in_use: Callable[[], bool],
        graphs: Graphs,
    ) -> None:
        """Take `layers`, the store that each reads, by number, and the weight [hidden] of the norm after the last.
        `in_use()`: whether Triton's kernels run there now."""
        self.layers, self.stores, self.norm, self.graphs = tuple(layers), tuple(stores), norm, graphs
        self.kinds = tuple(dict.fromkeys(layer.spec.kind for layer in layers))
        self._in_use = in_use
        # A mixture asks which experts its rows use, and waits for the answer: no capture allows that.
        self.capturable = all(layer.experts is None for layer in layers)

    def usable(self, texts: Iterable[Views]) -> bool:
        """Return whether this object can make a pass of texts with these stores: while the kernels are in use, and no
        gradients are wanted."""
        if not self._in_use() or torch.is_grad_enabled():
            return False
        return all(next(view for view in views if view is not None).values.dtype in STORE_TYPES for views in texts)

    def __call__(
        self,
        x: Tensor,
        spans: Mapping[str, Span],
        texts: Sequence[StoreRows],
        extra: Tensor | None = None,
        aux_layers: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        """Take rows x [T, hidden] through all layers and the norm after them; return them, and the rows as they leave
        each of `aux_layers`, [T, hidden] each. Arguments as of `FusedLayers`."""
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
        return self.graphs.run("pass", key, _reads(views), inputs, launches, captured)

    def run(
        self, x: Tensor, places: Places, extra: Tensor | None = None, wanted: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Launch all layers over x [T, hidden], and the norm; return the rows, and those that leave layers `wanted`."""
        outputs = {}
        normed = self._normed(0, x)
        for i in range(len(self.layers)):
            self._write(i, normed, places)
            x, following = self._rest(i, x, normed, places, None if extra is None else extra[:, i])
            if i in wanted:
                outputs[i] = x
            if i + 1 < len(self.layers):
                normed = following or self._normed(i + 1, x)
        return rms_norm(x, self.norm, self.layers[-1].eps), outputs

    def piece(
        self, x: Tensor, spans: Mapping[str, Span], texts: Sequence[StoreRows], extra: Tensor | None = None
    ) -> DevicePiece:
        """Prepare some rows of a pass, which goes through the layers piece by piece; arguments as in a call of all
        layers."""
        tensors = to_tensors({kind: spans[kind] for kind in self.kinds}, texts, x.device)
        tensors = tuple(tensor.to(x.device, non_blocking=True) for tensor in tensors)
        places = from_tensors(self.kinds, [(text.rows, text.views) for text in texts], tensors)
        self.graphs.counts["pass eager"] += 1
        return DevicePiece(self, x, places, extra)

    def one(self, number: int, x: Tensor, places: Places, extra: Tensor | None, work: Work) -> Tensor:
        """Do `work` of the layer `number`; return the rows x [T, hidden] as they leave it, or x for `KEYS` alone."""
        normed = self._normed(number, x)
        if work is not Work.REST:
            self._write(number, normed, places)
        return x if work is Work.KEYS else self._rest(number, x, normed, places, extra)[0]

    def _normed(self, number: int, x: Tensor) -> Normed:
        """Norm x [T, hidden] for the attention of layer `number`."""
        layer = self.layers[number]
        return _normed(x, layer.input_norm, layer.eps, layer.q, layer.k, layer.v)

    def _write(self, number: int, normed: Normed, places: Places) -> None:
        """Store K and V of normed rows, where the layer `number` has its own."""
        layer = self.layers[number]
        if layer.k is None:
            return
        spec, span = layer.spec, places.spans[layer.spec.kind]
        raw = normed.times(layer.k).view(-1, spec.kv_heads, spec.head_dim)  # [T, Hkv, D]
        v = raw if layer.v is None else normed.times(layer.v).view(-1, spec.kv_heads, spec.head_dim)
        k = None if self._view(number, places, 0).keys is None else _turned(raw, layer.k_norm, layer.eps, span)
        v = rms_norm(v, None, layer.eps) if layer.norm_values else v
        for i, text in enumerate(places.texts):
            rows = text.rows
            append(self._view(number, places, i), text.start, None if k is None else k[rows], v[rows])

    def _rest(
        self, number: int, x: Tensor, normed: Normed, places: Places, extra: Tensor | None
    ) -> tuple[Tensor, Normed | None]:
        """Attend and go through the MLP; return the rows [T, hidden], and the same normed for the next layer, where a
        kernel has done that with what was before."""
        layer = self.layers[number]
        y = layer.o(self._attended(number, normed, places))
        x, normed = _added(x, y, layer.attention_post_norm, layer.mlp_norm, layer.eps, layer.gate, layer.up)
        y = layer.down(self._gate(layer, normed))
        if layer.experts is not None:
            y = layer.experts(x, y)  # type: ignore[operator]  # a mixture of the model is called, one of a test is not
        if layer.ple_gate is None and layer.scalar is None and number + 1 < len(self.layers):
            after = self.layers[number + 1]
            return _added(x, y, layer.mlp_post_norm, after.input_norm, layer.eps, after.q, after.k, after.v)
        x = x + _post(y, layer.mlp_post_norm, layer.eps)
        if layer.ple_gate is not None:
            assert layer.ple_projection is not None and extra is not None
            y = gated(layer.ple_gate(x), extra.contiguous(), layer.activation)  # [T, per_layer_input]
            x = x + _post(layer.ple_projection(y), layer.ple_norm, layer.eps)
        return x if layer.scalar is None else x * layer.scalar, None

    def _attended(self, number: int, normed: Normed, places: Places) -> Tensor:
        """Attend with normed rows: [T, heads * head_dim]."""
        layer = self.layers[number]
        spec, span = layer.spec, places.spans[layer.spec.kind]
        q = _turned(normed.times(layer.q).view(-1, spec.heads, spec.head_dim), layer.q_norm, layer.eps, span)
        parts = [
            attention(
                q[text.rows],
                self._view(number, places, i),
                span.first[text.rows],
                span.end[text.rows],
                layer.scale,
            )
            for i, text in enumerate(places.texts)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)  # [T, H, D]
        return y.reshape(-1, spec.heads * spec.head_dim)

    def _gate(self, layer: Layer, normed: Normed) -> Tensor:
        """Return activation(gate) * up of normed rows: [T, I]."""
        gate, up = layer.gate.matrix, layer.up.matrix
        if normed.blocks is None or gate.bias is not None or up.bias is not None or not _alike(gate.blocks, up.blocks):
            return gated(normed.times(layer.gate), normed.times(layer.up), layer.activation)
        assert gate.blocks is not None and up.blocks is not None
        return gated_product(normed.blocks, gate.blocks, up.blocks, layer.activation, normed.dtype)

    def _view(self, number: int, places: Places, text: int) -> Any:
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


def _reads(views: Sequence[tuple[int, Views]]) -> list[object]:
    return [view for _, of_text in views for view in of_text if view is not None]


def _alike(one: Any, other: Any) -> bool:
    return (one.form, one.table, one.rows) == (other.form, other.table, other.rows)


def _normed(x: Tensor, weight: Tensor, eps: float, *parts: Any) -> Normed:
    """Norm x [T, hidden] for the matrices of `parts`."""
    if reads_blocks(*parts):
        return Normed(None, norm_quantise(x, weight, eps), x.dtype)
    return Normed(rms_norm(x, weight, eps), None, x.dtype)


def _added(x: Tensor, y: Tensor, post: Tensor | None, weight: Tensor, eps: float, *parts: Any) -> tuple[Tensor, Normed]:
    """Add y, normed with `post` where there is one, to x [T, hidden]; return that, and it normed for `parts`."""
    if reads_blocks(*parts):
        x, blocks = add_norm_quantise(x, y, post, weight, eps)
        return x, Normed(None, blocks, x.dtype)
    x = x + _post(y, post, eps)
    return x, Normed(rms_norm(x, weight, eps), None, x.dtype)


def _post(y: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return y if weight is None else rms_norm(y, weight, eps)


def _turned(x: Tensor, weight: Tensor | None, eps: float, span: DeviceSpan) -> Tensor:
    """Norm heads x [T, H, D], where they have a norm, and rotate them."""
    if weight is None:
        return rope(x, span.cos, span.sin)
    return norm_rope(x, weight, eps, span.cos, span.sin)
