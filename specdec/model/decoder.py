"""The decoder: one implementation for every family, described by a `DecoderSpec`.

A pass takes T token ids and returns the `States` of T rows, through the layers of `stack.py`. Rows of media come from
elsewhere than the embedding, and rows of a picture see all of the picture in sliding layers (`media.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from specdec import kernels
from specdec.cache import MAX_ROWS, KVCache, StoreShape
from specdec.kernels import KeyFromValue, Span
from specdec.model.adapters.adapter import Adapter, Adapters
from specdec.model.embedder.embedder import MediaEmbedder
from specdec.model.media import MediaBlocks, within
from specdec.model.spec import SLIDING, DecoderSpec
from specdec.model.stack import Layer, Linear, Rotations, SequenceRows, Stack
from specdec.model.states import States
from specdec.util.threads import one_torch_thread
from specdec.weights.tensors import Weight


@dataclass(frozen=True)
class PerLayerEmbedding:
    """Embed tokens a second time, for slices that feed every layer of Gemma 4 E2B/E4B (transformers
    `modeling_gemma4.py`)."""

    embedding: Weight  # [per_layer_vocab, layers * width]
    projection: Linear  # [layers * width, hidden]
    norm: Tensor  # [width]
    width: int
    eps: float

    def __call__(self, ids: Tensor, x: Tensor) -> Tensor:
        """Return per-layer inputs [T, layers, width], from ids [T] and scaled embeddings x [T, hidden]."""
        identity = self.embedding.rows(ids, x.dtype) * _scalar(self.width**0.5, x.dtype, x.device)
        context = self.projection(x) * float(x.shape[1]) ** -0.5
        context = context.view(ids.shape[0], -1, self.width)  # [T, layers, width]
        context = kernels.rms_norm(context, self.norm, self.eps)
        mixed: Tensor = (context + identity.view_as(context)) * math.sqrt(0.5)
        return mixed


class MemoryLimits(NamedTuple):
    """Describe the limits that a memory budget sets: `positions` of one text, `cache` bytes for all texts together, and
    of a mixture `experts` bytes of the matrices of its experts; None: all of them are in memory."""

    positions: int
    cache: int
    experts: int | None = None


class Decoder:
    """Run a text decoder: `forward` is one pass through all layers; `logits` is the head, for the rows that need it."""

    def __init__(
        self,
        spec: DecoderSpec,
        embedding: Weight,
        layers: Sequence[Layer],
        norm: Tensor,
        head: Weight,
        per_layer: PerLayerEmbedding | None = None,
        kv_dtype: torch.dtype | None = None,
        room: MemoryLimits | None = None,
        media: MediaEmbedder | None = None,
    ) -> None:
        """Make a decoder of its parts. `kv_dtype`: the type in which its caches keep K and V, a float type or int8;
        None: the compute dtype. `room`: the memory limits; None without a memory budget. `media`: what embeds pictures
        and sound; None: the decoder reads text alone."""
        self.spec = spec
        self.embedding = embedding
        stores = [i if kv is None else kv for i, kv in enumerate(layer.spec.kv_layer for layer in layers)]
        self.stack = Stack(layers, stores, norm, spec.norm_eps)
        self.norm = norm
        self.head = head
        self.per_layer = per_layer
        self._windows = {layer.kind: layer.window for layer in spec.layers}
        self.device = norm.device
        self.dtype = norm.dtype
        self.kv_dtype, self.room = kv_dtype or self.dtype, room
        self.media = media
        self.path: Path | None = None  # the file or folder that it was loaded from, beside which a drafter may lie
        self.rotations = Rotations(spec.ropes, self.dtype, self.device)
        self.adapters = Adapters()

    def __deepcopy__(self, memo: dict[int, object]) -> Decoder:
        return self  # nothing changes it

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # Weights are views of files and of large blocks, each of which would take all of its storage along.
        raise TypeError("a loaded model cannot be pickled; call specdec.load(...) in each process")

    @property
    def context(self) -> int:
        """Return the most positions that a text can have."""
        return self.spec.max_positions if self.room is None else min(self.spec.max_positions, self.room.positions)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Return the decoder layers, the first one first."""
        return self.stack.layers

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights as stored; a tied head counts once."""
        parts: list[object] = [self.embedding, self.norm, *([] if self.head is self.embedding else [self.head])]
        parts += [getattr(layer, f.name) for layer in self.layers for f in fields(layer)]
        if self.per_layer is not None:
            parts += [self.per_layer.embedding, self.per_layer.projection]
        parts += [] if self.media is None else [self.media]
        return sum(int(getattr(getattr(part, "weight", part), "nbytes", 0)) for part in parts)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the model's shape and norms, in hexadecimal, the same however its matrices are stored.

        Norms are float in every checkpoint, and training moves them. A fine-tune that left every norm alone has the
        fingerprint of its parent.
        """
        spec = self.spec
        digest = hashlib.sha256(f"{spec.vocab_size} {spec.hidden_size} {spec.layers}".encode())
        for norm in (self.norm, *(norm for layer in self.layers for norm in (layer.input_norm, layer.mlp_norm))):
            digest.update(norm.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def identity(self) -> str:
        """Return a hash of what a cache's bits depend on besides its tokens: the model, its storage and the arithmetic.

        The shape and the first row of every matrix are in it.
        """
        arithmetic = kernels.arithmetic(self.device)
        digest = hashlib.sha256(f"{self.fingerprint} {self.dtype} {self.kv_dtype} {arithmetic}".encode())
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        for weight in self._matrices():
            blocks = weight.packed
            digest.update(f"{weight.shape} {None if blocks is None else blocks.bits}".encode())
            digest.update(weight.rows(first, torch.float32).cpu().numpy().tobytes())
        return digest.hexdigest()

    def identity_of(self, adapter: str) -> str:
        """Return the identity of caches of texts with the adapter of this name; "": without one."""
        found = self.adapters.of(adapter)
        return (
            self.identity if found is None else hashlib.sha256(f"{self.identity} {found.identity}".encode()).hexdigest()
        )

    def _matrices(self) -> Iterator[Weight]:
        yield self.embedding
        for layer in self.layers:
            for field in fields(layer):
                if isinstance(linear := getattr(layer, field.name), Linear):
                    yield linear.weight
            yield from () if layer.experts is None else layer.experts.matrices

    def new_cache(self, max_rows: int = MAX_ROWS, adapter: str | None = None) -> KVCache:
        """Return an empty cache for one text, whose passes have at most `max_rows` rows, through the layers of
        `adapter` (`Adapters.resolve`)."""

        def shape_of(layer: Layer) -> StoreShape:
            spec = layer.spec
            return StoreShape(spec.kv_heads, spec.head_dim, spec.window, self._key_from_value(layer))

        shapes = [None if layer.k is None else shape_of(layer) for layer in self.layers]
        return KVCache(shapes, self.kv_dtype, self.device, max_rows, self.adapters.resolve(adapter))

    def _key_from_value(self, layer: Layer) -> Callable[[int], KeyFromValue] | None:
        """Return the means to make keys from values in a layer that has one projection for both; None: it stores
        both."""
        if not self.spec.keeps_values_alone(layer.spec):
            return None
        weight, kind = layer.k_norm, layer.spec.kind
        assert weight is not None

        def key_from_value(positions: int) -> KeyFromValue:
            return KeyFromValue(weight.float(), *self.rotations.rotating_tables(kind, positions))

        return key_from_value

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KVCache, aux_layers: Sequence[int] = (), media: MediaBlocks = ()) -> States:
        """Run one pass over ids [T] (int64) at the cache's next positions, and return the states of its rows.

        The rows' K/V are written; `cache.commit(n)` keeps the first n of them. `aux_layers`, `media`: see
        `forward_many`.
        """
        return self.forward_many([ids], [cache], aux_layers, [media] if media else ())

    @torch.inference_mode()
    def forward_many(
        self,
        ids: Sequence[Tensor],
        caches: Sequence[KVCache],
        aux_layers: Sequence[int] = (),
        media: Sequence[MediaBlocks] = (),
    ) -> States:
        """Run one pass over rows of several texts: ids[i] [T_i] at the next positions of caches[i], each another cache.

        The weights are read once for all texts. Returns the states of T_0 + T_1 + ... rows, bit for bit those of a
        `forward` for each text, with the outputs of `aux_layers` (the residual stream). media[i]: the blocks of text i,
        those without rows in this pass too; (): no text has any. A whole block is in one pass, of however many rows.
        """
        adapters = [self.adapters.of(cache.adapter) for cache in caches]
        texts = [
            SequenceRows(cache, cache.begin(len(rows)), len(rows), None if adapter is None else adapter.layers)
            for rows, cache, adapter in zip(ids, caches, adapters, strict=True)
        ]
        x, extra = self._inputs(ids, adapters)
        places = [(text.start, text.rows) for text in texts]
        if media:
            self._put_media(x, places, media)
        return self.stack(x, self.spans(places, media), texts, extra, aux_layers)

    def _inputs(self, ids: Sequence[Tensor], adapters: Sequence[Adapter | None]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings [T, hidden] and per-layer inputs of the rows of texts with these adapters."""
        if any(adapter is not adapters[0] for adapter in adapters):
            parts = [self._inputs([rows], [adapter]) for rows, adapter in zip(ids, adapters, strict=True)]
            extras = [extra for _, extra in parts if extra is not None]
            return torch.cat([x for x, _ in parts]), torch.cat(extras) if extras else None
        adapter, flat = adapters[0], ids[0] if len(ids) == 1 else torch.cat(tuple(ids))  # [T]
        x, per_layer = self.embed(flat, adapter), self.per_layer
        if per_layer is not None and adapter is not None and adapter.per_layer_projection is not None:
            per_layer = replace(per_layer, projection=adapter.per_layer_projection)
        return x, None if per_layer is None else per_layer(flat, x)

    def _put_media(self, x: Tensor, texts: Sequence[tuple[int, int]], media: Sequence[MediaBlocks]) -> None:
        """Replace the rows of media among x [T, hidden], which are not scaled as embeddings are."""
        assert self.per_layer is None, "what per-layer inputs of soft tokens are is not known"
        row = 0
        for (start, rows), blocks in zip(texts, media, strict=True):
            for block in within(blocks, start, start + rows):
                low, high = max(start, block.start), min(start + rows, block.end)
                assert not block.whole or high - low == block.end - block.start, "a whole block is cut"
                made = block.rows()  # [end - start, hidden]
                assert made.shape == (block.end - block.start, x.shape[1]), f"{tuple(made.shape)} rows of media"
                x[row + low - start : row + high - start] = made[low - block.start : high - block.start].to(x)
            row += rows

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: Sequence[str] | None = None) -> Tensor:
        """Return logits [T, vocab] in float32 of last states [T, hidden], soft-capped where the family does that.

        `adapters` [T]: the name of the adapter of each row's text; None: the default of all.
        """
        names = [self.adapters.default] * len(hidden) if adapters is None else adapters
        heads = [None if (adapter := self.adapters.of(name)) is None else adapter.head for name in names]
        parts, begin = [], 0
        for head, *others in (list(alike) for _, alike in groupby(heads, id)):
            rows = hidden[begin : begin + 1 + len(others)]
            parts.append(self.head.linear(rows) if head is None else head(rows))
            begin += len(rows)
        logits = (parts[0] if len(parts) == 1 else torch.cat(parts)).float()
        cap = self.spec.final_softcap
        if cap is not None:
            # A row at a time, on one thread: a vectorised tanh's tail must depend on neither rows nor threads. A second
            # thread is no gain here, and would go on polling on a core that the next pass needs.
            with one_torch_thread():
                for row in logits:
                    row.div_(cap).tanh_().mul_(cap)
        return logits

    @torch.inference_mode()
    def embed(self, ids: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Return embeddings [T, hidden] of ids [T], scaled as the family does."""
        embedding = self.embedding if adapter is None or adapter.embedding is None else adapter.embedding
        x = embedding.rows(ids, self.dtype)
        # transformers rounds Gemma's scale to the dtype before it multiplies (55.4256 becomes 55.5 in bf16).
        return x if self.spec.embed_scale == 1.0 else x * _scalar(self.spec.embed_scale, x.dtype, x.device)

    def spans(self, texts: Sequence[tuple[int, int]], media: Sequence[MediaBlocks] = ()) -> dict[str, Span]:
        """Return the span of each layer kind, for rows of several texts (first position, rows), with their media."""
        own = [start + t + 1 for start, rows in texts for t in range(rows)]
        sliding = _ends(texts, media, own) if media else own
        spans = {}
        for kind, window in self._windows.items():
            first = [0 if window is None else max(0, e - window) for e in own]
            spans[kind] = Span(*self.rotations(kind, texts), first, sliding if kind == SLIDING else own)
        return spans


def _ends(texts: Sequence[tuple[int, int]], media: Sequence[MediaBlocks], own: Sequence[int]) -> list[int]:
    """Return the ends of what rows of sliding layers see: their `own`, or that of the whole block that they are in."""
    ends, row = list(own), 0
    for (start, rows), blocks in zip(texts, media, strict=True):
        for block in within(blocks, start, start + rows):
            if block.whole:
                at = row + block.start - start
                ends[at : at + block.end - block.start] = [block.end] * (block.end - block.start)
        row += rows
    return ends


@cache
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `value` on the device; kept there, because a GPU would wait for it in every pass."""
    return torch.tensor(value, dtype=dtype, device=device)
