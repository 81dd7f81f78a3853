"""Gemma 4's assistants as GGUF files, in every dialect in which they are about.

What: `AssistantGGUF` shows such a file as the checkpoint of transformers' assistant: its config, and its tensors under
those names. The dialects (`DIALECTS`) are llama.cpp's, that of files from before llama.cpp took it up, and
ik_llama.cpp's; each key and tensor is found under any of its names, because files of one dialect have names of
another. Where they differ from the safetensors: llama.cpp's converter drops the centroids of E2B's and E4B's
assistants, and such a head then scores the whole vocabulary; ik_llama.cpp's `mtp_token_ordering` says for each token
which centroid it belongs to, where transformers' lists the tokens centroid by centroid. Left out: drafts of other kinds
(EAGLE-3, DFlash), and heads that are layers of the model's own file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Gemma4AssistantConfig, Gemma4TextConfig

from drafter.config import CENTROIDS, POST_PROJECTION, PRE_PROJECTION, TOKEN_ORDERING, Config, MTPHeadSpec
from specdec.model.families import EPSILON, LARGEST_HEAD, decoder_spec
from specdec.model.gguf_config import GGUFKeys, gemma4_layers, with_rope_divisors
from specdec.model.names import expected_tensors, gguf_name
from specdec.model.spec import DecoderSpec, RopeSpec
from specdec.weights.checkpoint import find
from specdec.weights.gguf.checkpoint import GGUFCheckpoint
from specdec.weights.metadata import Values, foreign, one_line, quote
from specdec.weights.tensors import Storage, Weight

ROPE_FREQS = "rope_freqs.weight"
_CLOSE = 1e-3  # of frequencies, relative: both are rounded to float32 on their ways


class Dialect(NamedTuple):
    """Name what one kind of file calls things: keys after the architecture's name, and tensors by canonical name."""

    architecture: str
    backbone_hidden: str
    centroids: str
    tensors: dict[str, str]


def _tensors(pre: str, post: str, centroids: str, ordering: str) -> dict[str, str]:
    return {PRE_PROJECTION: pre, POST_PROJECTION: post, CENTROIDS: centroids, TOKEN_ORDERING: ordering}


_MTP = {name: f"mtp.{name.rpartition('masked_embedding.')[2]}" for name in (PRE_PROJECTION, POST_PROJECTION, CENTROIDS)}
DIALECTS = {
    dialect.architecture: dialect
    for dialect in (
        Dialect(
            "gemma4-assistant",
            "embedding_length_out",
            "n_centroids",
            _tensors(
                "nextn.pre_projection.weight",
                "nextn.post_projection.weight",
                "masked_embd_centroids.weight",
                "masked_embd_ordering.weight",
            ),
        ),
        Dialect(
            "gemma4_assistant",
            "n_embd_backbone",
            "n_centroids",
            {**_MTP, TOKEN_ORDERING: "mtp.token_ordering.weight"},
        ),
        Dialect(
            "gemma4_mtp",
            "backbone_embedding_length",
            "centroid_count",
            _tensors(
                "mtp_pre_proj.weight", "mtp_post_proj.weight", "mtp_centroids.weight", "mtp_token_ordering.weight"
            ),
        ),
    )
}
"""By `general.architecture`."""
_BARE = "masked_embd_ordering"  # llama.cpp's own spelling of the table's name


BACKBONE = "specdec.backbone."  # keys of files that were written here: the fingerprint and name of the backbone


def backbone_in(metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return fingerprint and name of the backbone that a file names; None for files that were not written here."""
    values = Values(metadata, BACKBONE)
    if not values.has("fingerprint"):
        return None
    return values.text("fingerprint"), one_line(values.text("name", default="unnamed"))


class AssistantGGUF:
    """Read a Gemma 4 assistant's file as a `Checkpoint` with transformers' names, and its config.

    Raises ValueError when the file is damaged, is no assistant, or has sizes that no assistant has.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GGUFCheckpoint(path)
        self.metadata: dict[str, Any] = self._file.header.metadata
        self._keys = GGUFKeys(self.metadata)
        if self._keys.architecture not in DIALECTS:
            raise ValueError(
                f"{self.path}: a GGUF file of {quote(self._keys.architecture)} is not a drafter that is read here; "
                f"drafters are of {', '.join(DIALECTS)}"
            )
        stored = self._file.shapes()
        self._names: dict[str, str] = {}
        for dialect in DIALECTS.values():
            self._names.update({ours: theirs for ours, theirs in dialect.tensors.items() if theirs in stored})
        if _BARE in stored:
            self._names[TOKEN_ORDERING] = _BARE
        self.config = self._config(stored)
        text = decoder_spec(self.config.text_config)
        self._names.update({name: gguf_name(text, name) for name in expected_tensors(text)})
        self._dropped = {self._names.pop(n, "") for n in (CENTROIDS, TOKEN_ORDERING) if not self._clusters}

    @property
    def path(self) -> Path:
        """Return the file."""
        return self._file.path

    @property
    def _clusters(self) -> bool:
        return bool(self.config.use_ordered_embeddings)

    def _config(self, stored: Mapping[str, tuple[int, ...]]) -> Config:
        keys = self._keys
        embedding, pre = stored.get("token_embd.weight", ()), stored.get(self._names.get(PRE_PROJECTION, ""), ())
        if len(embedding) != 2 or len(pre) != 2:
            raise ValueError("has no token_embd.weight, or no projection of the backbone's state; fetch it again")
        widths = [dialect.backbone_hidden for dialect in DIALECTS.values() if keys.has(dialect.backbone_hidden)]
        layers = keys.whole("block_count", 1, len(stored))
        sizes = gemma4_layers(keys, layers)
        count = stored.get(self._names.get(CENTROIDS, ""), (0,))[0]
        # Without all of its parts a head by clusters is a dense one, which drafts as well, and more slowly.
        clusters = (
            count > 0
            and TOKEN_ORDERING in self._names
            and keys.has("centroid_top_k")
            and keys.flag("use_ordered_embeddings", default=True)
        )
        with foreign("the GGUF file's metadata"):
            text = Gemma4TextConfig(
                vocab_size=embedding[0],
                hidden_size=keys.whole("embedding_length", 1),
                num_hidden_layers=layers,
                num_kv_shared_layers=layers,
                num_attention_heads=keys.whole("attention.head_count", 1, LARGEST_HEAD),
                rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", *EPSILON),
                max_position_embeddings=keys.whole("context_length", 1),
                attention_k_eq_v=sizes["num_key_value_heads"] != sizes["num_global_key_value_heads"],
                hidden_size_per_layer_input=0,
                vocab_size_per_layer_input=0,
                final_logit_softcapping=None,
                **sizes,
            )
            return Gemma4AssistantConfig(
                text_config=text,
                backbone_hidden_size=keys.whole(widths[0], 1) if widths else pre[1] // 2,
                use_ordered_embeddings=clusters,
                num_centroids=count,
                centroid_intermediate_top_k=keys.whole("centroid_top_k", 1, count) if clusters else 1,
                tie_word_embeddings="output.weight" not in stored,
            )

    def for_backbone(self, spec: MTPHeadSpec, backbone: DecoderSpec) -> MTPHeadSpec:
        """Return `spec`, made from the config, with what a file leaves to the `backbone` that it drafts for.

        Raises ValueError when the file's rope is another one than the backbone's, whose keys it reads.
        """
        text = spec.text
        ropes = {**text.ropes, **{kind: rope for kind, rope in backbone.ropes.items() if kind in text.ropes}}
        if ROPE_FREQS in self._file.shapes():
            text = with_rope_divisors(text, self._file.tensor(ROPE_FREQS))
        else:  # which of its dimensions turn is in that tensor alone
            text = replace(text, ropes={**ropes, **{k: r for k, r in text.ropes.items() if k != "full_attention"}})
        for kind, rope in text.ropes.items():
            if not _same(rope, ropes[kind]):
                raise ValueError(f"the rope of its {kind} is not that of the backbone; fetch the drafter of this model")
        layers = tuple(
            layer
            if layer.kv_layer is None
            else replace(layer, values_from_keys=backbone.layers[layer.kv_layer].values_from_keys)
            for layer in text.layers
        )
        return replace(spec, text=replace(text, ropes=ropes, layers=layers))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape; tensors that no assistant has keep their own names."""
        stored = self._file.shapes()
        known = {ours: stored[theirs] for ours, theirs in self._names.items() if theirs in stored}
        left = {*stored} - {*self._names.values()} - self._dropped
        return {**known, **{name: stored[name] for name in left}}

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes in memory of the tensor, as `GGUFCheckpoint` counts them."""
        return self._file.loaded_bytes(self._stored(name), dtype, quantize)

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor as float32; the table of tokens as transformers has it."""
        tensor = self._file.tensor(self._stored(name))
        return self._by_centroid(tensor) if name == TOKEN_ORDERING else tensor

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name`, as `GGUFCheckpoint` makes it."""
        return self._file.weight(self._stored(name), dtype, quantize, rows)

    def _stored(self, name: str) -> str:
        shapes = self.shapes()
        find(name, shapes, self.path)
        return self._names.get(name, name)

    def _by_centroid(self, table: Tensor) -> Tensor:
        """Return token ids centroid by centroid, of a table [vocab] that lists them so, or that has each token's
        centroid. Raises ValueError for a table that is neither."""
        ids, count = table.long(), int(self.config.num_centroids)
        if torch.equal(ids.sort().values, torch.arange(len(ids), dtype=torch.int64)):
            return table
        if len(ids) % count or not torch.equal(
            ids.sort().values, torch.arange(count, dtype=torch.int64).repeat_interleave(len(ids) // count)
        ):
            raise ValueError(
                f"{self.path}: its table of tokens neither lists every token once, nor gives each of {count} "
                "centroids as many tokens; fetch it again"
            )
        return ids.argsort(stable=True).float()


def _same(ours: RopeSpec, theirs: RopeSpec) -> bool:
    a, b = (torch.tensor(rope.frequencies, dtype=torch.float64) for rope in (ours, theirs))
    return a.shape == b.shape and ours.factor == theirs.factor and bool(torch.allclose(a, b, rtol=_CLOSE, atol=0.0))
