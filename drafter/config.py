"""The network of a drafter, as data: Gemma 4's assistant, and the same head for any other backbone.

The network is built from `MTPHeadSpec` alone. For a Gemma 4 assistant, `assistant_spec` makes the spec from
transformers' config. For a backbone of another family, `head_spec` makes the spec from our own `MTPHeadConfig`: layers
of the backbone's own kind, with query-only attention over the K/V of the backbone's last layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from specdec.model.families import LARGEST_HEAD, decoder_spec
from specdec.model.names import expected_tensors
from specdec.model.spec import DecoderSpec, LayerSpec
from specdec.weights.metadata import Values

Config = Any  # transformers' Gemma4AssistantConfig or Gemma4UnifiedAssistantConfig
_DEEPEST = 1 << 12  # layers that a backbone may have
# Tensors that an MTP head has besides a decoder's.
PRE_PROJECTION, POST_PROJECTION = "pre_projection.weight", "post_projection.weight"
FUSE = "fuse.weight"
HEAD = "embed_tokens.weight"  # the rows of the tokens that a head scores
BIGRAM_LEFT, BIGRAM_RIGHT = "bigram.left.weight", "bigram.right.weight"
CENTROIDS, TOKEN_ORDERING = "masked_embedding.centroids.weight", "masked_embedding.token_ordering"
MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")  # `model_type` of Google's assistants
HEAD_TYPE = "specdec_mtp"  # `model_type` in the config.json of a head of our own format


@dataclass(frozen=True)
class MTPHeadSpec:
    """Describe an MTP head and the backbone that the head was made for.

    `text`: the head's own layers, whose `kv_layer` is the layer of the backbone that they read; the head can propose
    the tokens of its vocabulary. `pruned`: that vocabulary is a part of the backbone's, listed in the checkpoint.
    `bigram`: rank of the bias that the newest token gives every candidate; 0: no bias. `centroids`: clusters of the
    vocabulary, of which the best `top_centroids` are scored; 0: the whole vocabulary is scored. `aux_layers`: the
    backbone's layers whose outputs join the state that the first step of a draft begins with.
    """

    text: DecoderSpec
    backbone_hidden_size: int
    centroids: int = 0
    top_centroids: int = 0
    pruned: bool = False
    bigram: int = 0
    aux_layers: tuple[int, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        """Return the backbone's layers whose K/V the head attends to, ascending."""
        return tuple(sorted({layer.kv_layer for layer in self.text.layers if layer.kv_layer is not None}))


@dataclass(frozen=True)
class MTPHeadConfig:
    """Describe a head in our own format.

    `reads`: for each of the head's layers the layer of the backbone that lends its K/V and its kind. `draft_vocab`: how
    many tokens the head can propose; 0: all of the backbone's. `aux_layers`: see `MTPHeadSpec`; EAGLE-3 (arXiv
    2503.01840) fuses a low, a middle and a high layer. Sizes are counts of elements.
    """

    hidden_size: int
    intermediate_size: int
    reads: tuple[int, ...]
    heads: int
    draft_vocab: int = 0
    bigram: int = 0
    aux_layers: tuple[int, ...] = ()

    @classmethod
    def like(cls, backbone: DecoderSpec, depth: int | None = None, draft_vocab: int = 8192) -> MTPHeadConfig:
        """Return the config of a head as wide as its backbone, of `depth` layers that are like the backbone's last.

        `depth` None: a tenth of the backbone's layers, at least one of each kind. The head's last layer reads the
        backbone's last full attention, as in Gemma 4's assistants; the head's earlier layers read the backbone's layers
        before.

        Raises:
            ValueError: the backbone has fewer than `depth` layers that store K/V.
        """
        depth = depth or max(len(backbone.shared_kv_layers), round(len(backbone.layers) / 10))
        last = backbone.shared_kv_layers.get("full_attention", max(backbone.shared_kv_layers.values()))
        others = [i for i, layer in enumerate(backbone.layers) if layer.kv_layer is None and i != last]
        if depth > 1 + len(others):
            raise ValueError(f"a head of {depth} layers; the backbone has {1 + len(others)} that store K/V")
        reads = (*others[len(others) - depth + 1 :], last)
        model, vocab = backbone.layers[last], 0 if draft_vocab >= backbone.vocab_size else draft_vocab
        return cls(backbone.hidden_size, model.intermediate_size, reads, model.heads, vocab)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and `model_type`, as config.json has them; `from_dict` reads them."""
        return {"model_type": HEAD_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MTPHeadConfig:
        """Return the config that `values`, read from config.json, describes.

        Raises:
            ValueError: values are missing, or sizes are impossible.
        """
        own = Values(values)
        reads = own.wholes("reads", 0, _DEEPEST)
        if not 0 < len(reads) <= _DEEPEST:
            raise ValueError(f"the head's config.json has impossible sizes: {len(reads)} layers")
        return cls(
            own.whole("hidden_size", 1),
            own.whole("intermediate_size", 1),
            tuple(reads),
            own.whole("heads", 1, LARGEST_HEAD),
            own.whole("draft_vocab", default=0),
            own.whole("bigram", default=0),
            tuple(own.wholes("aux_layers", 0, _DEEPEST)) if own.has("aux_layers") else (),
        )


def head_spec(config: MTPHeadConfig, backbone: DecoderSpec) -> MTPHeadSpec:
    """Return the spec of the head that `config` describes, for `backbone`.

    Raises:
        ValueError: the head reads a layer that the backbone lacks or that stores no K/V, has query heads that do not
            share K/V heads evenly, has a draft vocabulary larger than the backbone's, or fuses the states of layers
            that the backbone lacks, or of one layer twice.
    """
    layers = []
    for read in config.reads:
        if read >= len(backbone.layers) or backbone.layers[read].kv_layer is not None:
            raise ValueError(f"the head reads the K/V of layer {read}, and the backbone stores none there")
        layer = replace(
            backbone.layers[read], heads=config.heads, intermediate_size=config.intermediate_size, kv_layer=read
        )
        if layer.heads % layer.kv_heads:
            raise ValueError(f"{layer.heads} query heads cannot share the backbone's {layer.kv_heads} K/V heads evenly")
        layers.append(layer)
    if config.draft_vocab > backbone.vocab_size:
        raise ValueError(f"a draft vocabulary of {config.draft_vocab}; the backbone has {backbone.vocab_size} tokens")
    if len(set(config.aux_layers)) < len(config.aux_layers) or max(config.aux_layers, default=0) >= len(
        backbone.layers
    ):
        raise ValueError(
            f"the head fuses the states of layers {list(config.aux_layers)}; name different ones, each below "
            f"{len(backbone.layers)}"
        )
    text = replace(
        backbone,
        vocab_size=config.draft_vocab or backbone.vocab_size,
        hidden_size=config.hidden_size,
        layers=tuple(layers),
        norm_offset=0.0,
        layer_scalar=False,
        final_softcap=None,
        tied_head=True,  # one matrix, and it is the head: embeddings are the backbone's
        per_layer_input=0,
        per_layer_vocab=0,
        experts=None,
        media=None,
        reads_backbone=True,
    )
    return MTPHeadSpec(
        text,
        backbone.hidden_size,
        pruned=config.draft_vocab > 0,
        bigram=config.bigram,
        aux_layers=config.aux_layers,
    )


def assistant_spec(config: Config, backbone: DecoderSpec) -> MTPHeadSpec:
    """Return the spec of the assistant that `config` describes, which reads the K/V of `backbone`.

    Raises:
        ValueError: the assistant was made for another backbone (every difference is listed), or has a feature that is
            not supported.
    """
    text = decoder_spec(config.text_config)
    if text.per_layer_input:
        raise ValueError(f"an assistant's hidden_size_per_layer_input must be 0, not {text.per_layer_input}")
    source = backbone.shared_kv_layers
    values = Values(config)
    width = values.whole("backbone_hidden_size", 1)
    problems = [
        f"{what} is {ours}, the backbone's {theirs}"
        for what, ours, theirs in (
            ("vocabulary", text.vocab_size, backbone.vocab_size),
            ("backbone_hidden_size", width, backbone.hidden_size),
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
    text = replace(text, layers=layers, tied_head=values.flag("tie_word_embeddings"), reads_backbone=True)
    if not values.flag("use_ordered_embeddings", default=False):
        return MTPHeadSpec(text, width)
    count, top = values.whole("num_centroids", 1), values.whole("centroid_intermediate_top_k", 1)
    if top > count or text.vocab_size % count:
        raise ValueError(
            f"the assistant's config has num_centroids={count} and centroid_intermediate_top_k={top}; its "
            f"vocabulary of {text.vocab_size} must split evenly, and no more be picked than there are"
        )
    return MTPHeadSpec(text, width, count, top)


def _misfits(layer: LayerSpec, source: LayerSpec | None) -> list[str]:
    """Return the differences that keep the queries of `layer` from the K/V that `source` stores."""
    if source is None:
        return [f"{layer.kind} layers, of which the backbone has none"]
    return [
        f"{name} of {layer.kind} is {getattr(layer, name)}, the backbone's {getattr(source, name)}"
        for name in ("kv_heads", "head_dim", "window")
        if getattr(layer, name) != getattr(source, name)
    ]


def extra_tensors(spec: MTPHeadSpec) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that an MTP head has besides a decoder's."""
    text = spec.text
    shapes: dict[str, tuple[int, ...]] = {
        PRE_PROJECTION: (text.hidden_size, 2 * spec.backbone_hidden_size),
        POST_PROJECTION: (spec.backbone_hidden_size, text.hidden_size),
    }
    if spec.centroids:
        shapes[CENTROIDS] = (spec.centroids, text.hidden_size)
        shapes[TOKEN_ORDERING] = (text.vocab_size,)
    if spec.aux_layers:
        shapes[FUSE] = (spec.backbone_hidden_size, len(spec.aux_layers) * spec.backbone_hidden_size)
    if spec.bigram:
        shapes[BIGRAM_LEFT] = (text.vocab_size + 1, spec.bigram)
        shapes[BIGRAM_RIGHT] = (text.vocab_size, spec.bigram)
    return shapes


def head_tensors(spec: MTPHeadSpec) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors of a head; the head's output matrix is `embed_tokens.weight`."""
    assert spec.text.tied_head and not spec.centroids
    return {**expected_tensors(spec.text), **extra_tensors(spec)}
