"""Gemma 4's multi-token-prediction head (its "assistant"): a few layers that attend to the backbone's K/V.

The network of transformers' `modeling_gemma4_assistant.py` and `modeling_gemma4_unified_assistant.py`, for
one query row:

    x = pre_projection([embedding of the newest token ; h])     [1, 2 * backbone hidden] -> [1, hidden]
    x = norm(stack(x))                                           queries only; K/V are the backbone's
    next token = argmax head(x);  next h = post_projection(x)

Sliding layers read the K/V of the backbone's last sliding layer that stores any, full layers those of the
last full one. Every step of a round has the position p of the pending token and sees committed keys only:
j <= p - 1.

Left out: more than one query row, and training. The head has no soft-capping, unlike the backbone's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from specdec import kernels
from specdec.cache import KVCache
from specdec.kernels import Span
from specdec.model.decoder import Linear, Rotations, Stack, TextPass
from specdec.model.families import decoder_spec
from specdec.model.spec import DecoderSpec, LayerSpec
from specdec.weights.tensors import Weight

Config = Any  # transformers' Gemma4AssistantConfig or Gemma4UnifiedAssistantConfig


@dataclass(frozen=True)
class AssistantSpec:
    """An assistant and the backbone it was made for.

    `text`: its own layers, whose `kv_layer` is the layer of the backbone that they read. `centroids`: clusters
    of the vocabulary, of which the best `top_centroids` are scored; 0: the whole vocabulary is.
    """

    text: DecoderSpec
    backbone_hidden_size: int
    centroids: int = 0
    top_centroids: int = 0


def assistant_spec(config: Config, backbone: DecoderSpec) -> AssistantSpec:
    """The assistant that `config` describes, reading the K/V of `backbone`.

    Raises:
        ValueError: it was made for another backbone (every difference is listed), or has a feature that is
            not supported.
    """
    text = decoder_spec(config.text_config)
    if text.per_layer_input:
        raise ValueError(f"an assistant's hidden_size_per_layer_input must be 0, not {text.per_layer_input}")
    source = backbone.shared_kv_layers
    problems = [
        f"{what} is {ours}, the backbone's {theirs}"
        for what, ours, theirs in (
            ("vocabulary", text.vocab_size, backbone.vocab_size),
            ("backbone_hidden_size", config.backbone_hidden_size, backbone.hidden_size),
        )
        if ours != theirs
    ]
    for kind, layer in {layer.kind: layer for layer in text.layers}.items():
        problems += _misfits(layer, backbone.layers[source[kind]] if kind in source else None)
    if problems:
        raise ValueError(
            f"this assistant was made for another backbone than this {backbone.model_type}: "
            f"{'; '.join(problems)}. Use the assistant of this very model (google/gemma-4-12B-it has "
            "google/gemma-4-12B-it-assistant)"
        )
    layers = tuple(replace(layer, kv_layer=source[layer.kind]) for layer in text.layers)
    text = replace(text, layers=layers, tied_head=bool(config.tie_word_embeddings), reads_backbone=True)
    if not config.use_ordered_embeddings:
        return AssistantSpec(text, config.backbone_hidden_size)
    count, top = config.num_centroids, config.centroid_intermediate_top_k
    if not 0 < top <= count or text.vocab_size % count:
        raise ValueError(
            f"the assistant's config has num_centroids={count} and centroid_intermediate_top_k={top}; its "
            f"vocabulary of {text.vocab_size} must split evenly, and no more be picked than there are"
        )
    return AssistantSpec(text, config.backbone_hidden_size, count, top)


def _misfits(layer: LayerSpec, source: LayerSpec | None) -> list[str]:
    """What keeps the queries of `layer` from the K/V that `source` stores."""
    if source is None:
        return [f"{layer.kind} layers, of which the backbone has none"]
    return [
        f"{name} of {layer.kind} is {getattr(layer, name)}, the backbone's {getattr(source, name)}"
        for name in ("kv_heads", "head_dim", "window")
        if getattr(layer, name) != getattr(source, name)
    ]


@dataclass(frozen=True)
class DenseHead:
    """Scores the whole vocabulary."""

    weight: Weight  # [vocab, hidden]

    def logits(self, x: Tensor) -> Tensor:
        """x [1, hidden] -> [1, vocab] in x's dtype."""
        return self.weight.linear(x)

    def best(self, x: Tensor) -> Tensor:
        """The best token of x [1, hidden]: int64 [1]."""
        return self.logits(x).argmax(dim=-1)


@dataclass(frozen=True)
class CentroidHead:
    """Scores the tokens of the best few clusters only (`use_ordered_embeddings`: drafters of small models).

    `clusters` [centroids, vocab / centroids] int64: the token ids of each cluster. `top`: clusters to score.
    """

    weight: Weight  # [vocab, hidden]
    centroids: Weight  # [centroids, hidden]
    clusters: Tensor
    top: int

    def candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [1, hidden] -> ids [C] int64 of the best clusters' tokens, their logits [1, C] in x's dtype."""
        picked = self.centroids.linear(x).topk(self.top, dim=-1).indices[0]  # [top]
        ids = self.clusters[picked].flatten()  # [top, vocab / centroids] -> [C]
        return ids, kernels.dense_linear(x, self.weight.rows(ids, x.dtype))

    def best(self, x: Tensor) -> Tensor:
        """The best token of x [1, hidden]: int64 [1]."""
        ids, logits = self.candidates(x)
        return ids[logits.argmax(dim=-1)]


@dataclass(frozen=True)
class Assistant:
    """The network, ready to run on the device and in the dtype of its backbone."""

    spec: AssistantSpec
    pre: Linear  # [hidden, 2 * backbone hidden]
    stack: Stack
    post: Linear  # [backbone hidden, hidden]
    head: DenseHead | CentroidHead
    rotations: Rotations

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices as stored; the tied head counts once."""
        parts: list[object] = [self.pre, self.post, self.head]
        parts += [getattr(layer, f.name) for layer in self.stack.layers for f in fields(layer)]
        weights = [getattr(part, name, None) for part in parts for name in ("weight", "centroids")]
        return sum(weight.nbytes for weight in weights if weight is not None)

    def spans(self, position: int) -> dict[str, Span]:
        """What one query row at `position` sees, by layer kind: committed keys only.

        transformers counts the window from the newest key and includes both ends, so the oldest key is
        `position - 1 - window`: two positions further back than the backbone's own row there would see.
        """
        spans = {}
        for kind, window in {layer.spec.kind: layer.spec.window for layer in self.stack.layers}.items():
            first = 0 if window is None else max(0, position - 1 - window)
            spans[kind] = Span(*self.rotations(kind, [(position, 1)]), [first], [position])
        return spans

    def step(self, embedding: Tensor, hidden: Tensor, spans: dict[str, Span], cache: KVCache) -> tuple[Tensor, Tensor]:
        """One draft step.

        `embedding` [1, backbone hidden]: the newest token's, scaled as the backbone does. `hidden` [1,
        backbone hidden]: the backbone's state that chose it, or the second result of the step before. Returns
        the head's input [1, hidden] and the next step's `hidden`.
        """
        x = self.pre(torch.cat((embedding, hidden), dim=-1))  # [1, 2 * backbone hidden] -> [1, hidden]
        x = self.stack(x, spans, [TextPass(cache, cache.length, 1)])
        return x, self.post(x)
