"""The format in which a head is kept: our own, or, for a Gemma 4 backbone, transformers' assistant.

A `Form` is a head's shape and the way in which the head is saved; training knows no other part of the formats.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from drafter.config import Config, MTPHeadConfig, MTPHeadSpec, assistant_spec, head_spec, head_tensors
from drafter.files.assistant import assistant_config, save_assistant
from drafter.files.checkpoint import provenance_of, read_stored
from drafter.files.head import STORED, as_stored, save_head
from drafter.settings import Shape
from specdec.model.build import Source
from specdec.model.decoder import Decoder
from specdec.model.spec import DecoderSpec
from specdec.weights.checkpoint import Checkpoint
from specdec.weights.gguf.checkpoint import GGUFCheckpoint
from specdec.weights.metadata import naming

_NO_AUX = "Gemma 4's assistants take the last state alone; train this head without --aux-layers"


class Trained(NamedTuple):
    """Keep a head that is to be saved.

    `tensors`: as `Network.tensors()` gives them. `draft_ids` [candidates]: the tokens that the head scores. `backbone`:
    the model that the head was trained for. `about`: what the folder says of the head; any JSON. `draft_length`: the
    length of the drafts that the head was trained for.
    """

    tensors: Mapping[str, Tensor]
    draft_ids: Tensor
    backbone: Decoder
    about: Mapping[str, Any]
    draft_length: int


class Form(Protocol):
    """Describe a head's shape, and save the head. `draft_vocab`: how many tokens the head can propose, 0: all."""

    @property
    def draft_vocab(self) -> int:
        """Return how many tokens the head can propose; 0: all of the backbone's."""

    def spec(self, backbone: DecoderSpec) -> MTPHeadSpec:
        """Return the spec of such a head for `backbone`.

        Raises:
            ValueError: `backbone` cannot have such a head.
        """

    def save(self, folder: Path, head: Trained) -> None:
        """Write a usable drafter to `folder`."""

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return the head's tensor `name` as it is once it was saved, float32."""

    def to_dict(self) -> dict[str, Any]:
        """Return the head's config in JSON types, for the record of a training run."""


@dataclass(frozen=True)
class OwnForm:
    """Describe a head in our own format: any size, any part of the vocabulary, quantised to `bits`."""

    config: MTPHeadConfig
    bits: int = 8

    @property
    def draft_vocab(self) -> int:
        """Return the size of the draft vocabulary that the config names; 0: all tokens."""
        return self.config.draft_vocab

    def spec(self, backbone: DecoderSpec) -> MTPHeadSpec:
        """Return the spec of this head for `backbone`. Raises ValueError: see `drafter.config.head_spec`."""
        return head_spec(self.config, backbone)

    def save(self, folder: Path, head: Trained) -> None:
        """Write `config.json` and the quantised `mtp.gguf` to `folder`: see `drafter.files.head.save_head`."""
        save_head(folder, self.config, head.tensors, head.draft_ids, head.backbone, head.about, self.bits)

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return the head's tensor `name` as its blocks give it back: see `drafter.files.head.as_stored`."""
        return as_stored(name, tensor, self.bits)

    def to_dict(self) -> dict[str, Any]:
        """Return the config, without `bits`: the saved matrices say their own."""
        return self.config.to_dict()


@dataclass(frozen=True)
class MTPHeadFormat:
    """Describe a Gemma 4 assistant, float, with the whole vocabulary."""

    config: Config
    draft_vocab = 0

    def spec(self, backbone: DecoderSpec) -> MTPHeadSpec:
        """Return the spec of the assistant for `backbone`. Raises ValueError: see `drafter.config.assistant_spec`."""
        return assistant_spec(self.config, backbone)

    def save(self, folder: Path, head: Trained) -> None:
        """Write an assistant that transformers loads to `folder`: see `drafter.files.assistant.save_assistant`."""
        spec = self.spec(head.backbone.spec)
        save_assistant(folder, self.config, spec, head.tensors, head.backbone, head.about, head.draft_length)

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor`, which is saved as it is."""
        return tensor

    def to_dict(self) -> dict[str, Any]:
        """Return transformers' config of the assistant as a dict."""
        return dict(self.config.to_dict())


class Start(NamedTuple):
    """Keep a head that training goes on from.

    `tensors`: as `Network` takes them. `draft_ids`: the tokens of a pruned head. `provenance`: what the folder says of
    the head's making; any JSON. `renewed`: whether the tokens that the head proposes are chosen anew, from the training
    set. `trained_for`: the name of the backbone that the head says it was trained for, where that is another one.
    """

    form: Form
    tensors: dict[str, Tensor]
    draft_ids: Tensor | None
    provenance: Any = None
    trained_for: str | None = None
    renewed: bool = False

    def with_draft_vocab(self, count: int) -> Start:
        """Return this start for a head that proposes `count` tokens (0: all), which the training set chooses.

        Raises:
            ValueError: it is a Gemma 4 assistant, which proposes its backbone's whole vocabulary.
        """
        if not isinstance(self.form, OwnForm):
            raise ValueError("Gemma 4's assistants propose every token; train this head without --draft-vocab")
        form = replace(self.form, config=replace(self.form.config, draft_vocab=count))
        return self._replace(form=form, renewed=True)

    def averaged(self, others: Mapping[str, Start]) -> Start:
        """Return this start with the mean of its weights and those of `others`, heads by name, which went on from it,
        from one another, or from the same head (model soups, arXiv 2203.05482).

        Raises:
            ValueError: one of `others`, which is named, has another shape, or proposes other tokens.
        """
        for name, other in others.items():
            if not self._is_like(other):
                raise ValueError(
                    f"{name}: has another shape than the head that training begins with, or proposes other tokens; "
                    "only heads that went on from one another, or from the same head, have a mean"
                )
        starts = (self, *others.values())
        mean = {name: torch.stack([start.tensors[name] for start in starts]).mean(dim=0) for name in self.tensors}
        return self._replace(tensors=mean)

    def record(self, name: str, others: Mapping[str, Start]) -> dict[str, Any]:
        """Describe this start, the head `name`, and `others` that it is averaged with, in JSON types, for the record of
        what training makes of it. What several went on from is told once: such records would double with every mean."""
        found: dict[str, Any] = {"name": name, "provenance": self.provenance, "trained_for": self.trained_for}
        if others:
            told, entries = list(_ancestry(self.provenance)), list[dict[str, Any]]()
            for other, one in others.items():
                entries.append(_entry(other, one.provenance, told))
                told += _ancestry(one.provenance)
            found["averaged_with"] = entries
        return found

    def _is_like(self, other: Start) -> bool:
        """Tell whether `other` has the same tensors, reads the same and proposes the same. Assistants propose all
        tokens, and their configs may differ in what has nothing to do with weights."""
        if self.draft_ids is None or other.draft_ids is None:
            alike = self.draft_ids is other.draft_ids
        else:
            alike = self.form == other.form and torch.equal(self.draft_ids, other.draft_ids)
        return alike and {k: v.shape for k, v in self.tensors.items()} == {k: v.shape for k, v in other.tensors.items()}


def _begun(provenance: Any) -> dict[str, Any]:
    """Return what `provenance`, any JSON, says of the head that training began with; {} where it says nothing."""
    start = provenance.get("start") if isinstance(provenance, dict) else None
    return start if isinstance(start, dict) else {}


def _ancestry(provenance: Any) -> Iterator[Any]:
    """Yield `provenance`, then that of the head that training began with there, and so on."""
    while provenance:
        yield provenance
        provenance = _begun(provenance).get("provenance")


def _entry(name: Any, provenance: Any, told: Sequence[Any]) -> dict[str, Any]:
    """Return the record of the head `name`: its name alone where `told` has its provenance, and so for those that it
    went on from."""
    if provenance and provenance in told:
        return {"name": name}
    if start := _begun(provenance):
        found = _entry(start.get("name"), start.get("provenance"), told)
        provenance = {**provenance, "start": found if len(found) == 1 else {**start, **found}}
    return {"name": name, "provenance": provenance}


def read_start(
    name_or_path: str | os.PathLike[str], backbone: Decoder, bits: int = 8, aux_layers: tuple[int, ...] = ()
) -> Start:
    """Read a head from a folder, GGUF file or hub id (a released assistant), in float32, for training to go on from.

    `bits`: of the matrices of the head that training saves. `aux_layers`: the layers of the backbone whose outputs the
    head is to fuse from now on, those that it fuses already among them; the weights of new ones are zero at first.

    A head that was trained for another backbone is a start too, if it fits this one: the other may be what `backbone`
    is a fine-tune of. `trained_for` of the result tells. To fit is to read layers that store K/V of the backbone's
    sizes, to have its width, and to propose tokens of its vocabulary; that they are the same words cannot be seen.

    Raises:
        ValueError: there is no head, the head does not fit `backbone`, scores its vocabulary by clusters, or fuses
            layers that are not among `aux_layers`; or `aux_layers` are named for a Gemma 4 assistant, which fuses none.
    """
    stored = read_stored(name_or_path)
    with naming(stored.path):
        spec = stored.fit(backbone.spec)
        if stored.draft_ids is not None and int(stored.draft_ids.max()) >= backbone.spec.vocab_size:
            raise ValueError(f"proposes tokens that a vocabulary of {backbone.spec.vocab_size} does not have")
        if wrong := _misshapen(stored.checkpoint, spec):
            raise ValueError(f"was made for another backbone: {wrong}")
    other = stored.meant is not None and stored.meant[0] != backbone.fingerprint
    trained_for = stored.meant[1] if stored.meant is not None and other else None
    if spec.centroids:
        raise ValueError(f"{stored.path}: scores clusters of its vocabulary, and such heads cannot be trained here")
    source = Source.huggingface(stored.checkpoint, spec.text)
    tensors = {
        name: stored.checkpoint.tensor(source.names.get(name, name)).float().view(shape)
        for name, shape in head_tensors(spec).items()
    }
    made = provenance_of(stored.path)
    if not isinstance(stored.shape, MTPHeadConfig):
        if aux_layers:
            raise ValueError(_NO_AUX)
        return Start(MTPHeadFormat(stored.shape), tensors, None, made, trained_for)
    config = stored.shape
    if aux_layers and not set(config.aux_layers) <= set(aux_layers):
        raise ValueError(
            f"{stored.path}: fuses the states of layers {list(config.aux_layers)}, and goes on with those; "
            "--aux-layers can add others to them"
        )
    if aux_layers and config.aux_layers != aux_layers:
        tensors["fuse.weight"] = _widened(tensors.get("fuse.weight"), config.aux_layers, aux_layers, backbone.spec)
        config = replace(config, aux_layers=aux_layers)
    return Start(OwnForm(config, bits), tensors, stored.draft_ids, made, trained_for)


def _misshapen(checkpoint: Checkpoint, spec: MTPHeadSpec) -> str:
    """Return the first tensor of a head of `spec` that `checkpoint` lacks, or has in another size, in words; "" for
    none."""
    if spec.centroids:
        return ""
    names, stored = Source.huggingface(checkpoint, spec.text).names, checkpoint.shapes()
    for name, shape in head_tensors(spec).items():
        found = stored.get(names.get(name, name))
        if found is None or math.prod(found) != math.prod(shape):
            return f"{name} is {'missing' if found is None else list(found)}, and {list(shape)} would fit"
    return ""


def _widened(fuse: Tensor | None, have: tuple[int, ...], want: tuple[int, ...], backbone: DecoderSpec) -> Tensor:
    """Return the matrix that fuses the layers `want`, [hidden, layers * hidden]: `fuse` for the layers `have`, zero for
    the others."""
    hidden = backbone.hidden_size
    wide = torch.zeros(hidden, len(want), hidden, dtype=torch.float32)
    if fuse is not None:
        wide[:, [want.index(layer) for layer in have]] = fuse.view(hidden, len(have), hidden)
    return wide.view(hidden, len(want) * hidden)


def stored_bits(name_or_path: str | os.PathLike[str]) -> int:
    """Return the bits of the layers' matrices of a head in our own format, as `read_start` takes them; 8 for others.

    Raises:
        ValueError: there is no head.
    """
    checkpoint = read_stored(name_or_path).checkpoint
    kinds = {kind: bits for bits, kind in STORED.items()}
    tensors = checkpoint.header.tensors if isinstance(checkpoint, GGUFCheckpoint) else {}
    found = (kinds.get(info.type) for name, info in tensors.items() if name.startswith("layers."))
    return min(filter(None, found), default=8)


def form_for(shape: Shape, backbone: DecoderSpec, config: Config) -> Form:
    """Return the form of a head of `shape` for the backbone with transformers' text config `config`.

    Raises:
        ValueError: `shape` asks for a bigram bias or for fused layers, and Gemma 4's assistants have neither.
    """
    head = MTPHeadConfig.like(backbone, shape.depth, shape.draft_vocab)
    head = replace(head, intermediate_size=shape.width or head.intermediate_size, bigram=shape.bigram)
    head = replace(head, aux_layers=shape.aux_layers)
    if not config.model_type.startswith("gemma4"):
        return OwnForm(head, shape.bits)
    if shape.bigram:
        raise ValueError("Gemma 4's assistants have no bigram bias; train this head without one")
    if shape.aux_layers:
        raise ValueError(_NO_AUX)
    return MTPHeadFormat(assistant_config(config, backbone, head))
