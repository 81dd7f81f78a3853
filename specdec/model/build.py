"""From a checkpoint to a `Decoder`: strict about names and shapes, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from specdec.model.decoder import Decoder, MemoryLimits, PerLayerEmbedding
from specdec.model.embedder.embedder import AudioEmbedder, LayerNorm, MediaEmbedder, VisionEmbedder
from specdec.model.embedder.spec import MediaSpec, is_media
from specdec.model.experts import ExpertPages, Experts
from specdec.model.names import PER_LAYER_TABLE, expected_tensors, gguf_name, hf_names, ignorable, is_expert_matrix
from specdec.model.spec import DecoderSpec
from specdec.model.stack import Layer, Linear
from specdec.weights.arena import Arena
from specdec.weights.checkpoint import Checkpoint, RowSource
from specdec.weights.formats.experts import with_gathered_experts
from specdec.weights.metadata import one_line
from specdec.weights.tensors import BlockWeight, Storage, Weight

Quantize = Storage | Literal["int4-all"]
"""What a user asks of a whole model; "int4" leaves the vocabulary at 8 bits, "int4-all" does not."""
Progress = Callable[[str], None]
_LISTED = 8  # tensors of a kind that an error lists


@dataclass(frozen=True)
class Source:
    """Hold a checkpoint, its name of each tensor, and the two ways in which formats differ in content."""

    checkpoint: Checkpoint
    names: Mapping[str, str]  # canonical -> the checkpoint's
    norm_offset: float  # added to every norm weight
    interleaved_rope: bool  # rows of q and k are in llama.cpp's order

    def stays_in_file(self, name: str) -> bool:
        """Return whether the tensor of this canonical name is not loaded: its rows are read when they are needed."""
        return name == PER_LAYER_TABLE and isinstance(self.checkpoint, RowSource)

    @classmethod
    def huggingface(cls, checkpoint: Checkpoint, spec: DecoderSpec) -> Source:
        """Return the source of a checkpoint with transformers' names."""
        checkpoint = with_gathered_experts(checkpoint, 0 if spec.experts is None else spec.experts.count)
        return cls(checkpoint, hf_names(spec, checkpoint.shapes()), spec.norm_offset, False)

    @classmethod
    def gguf(cls, checkpoint: Checkpoint, spec: DecoderSpec) -> Source:
        """Return the source of a GGUF file, whose norms have their offset already and whose Llama rows are
        interleaved."""
        # `MmprojCheckpoint` has an embedder's tensors under their canonical names.
        names = {name: name if is_media(name) else gguf_name(spec, name) for name in expected_tensors(spec)}
        checkpoint = with_gathered_experts(checkpoint, 0 if spec.experts is None else spec.experts.count)
        return cls(checkpoint, names, 0.0, spec.model_type == "llama")


class Reader(Protocol):
    """Read the tensors of a model by canonical name, on the device and in the dtype of the model. `pages`: what keeps
    its experts within a part of the memory; None: they are all in memory."""

    pages: ExpertPages | None

    def matrix(self, name: str) -> Weight:
        """Return the matrix `name`, ready to multiply."""

    def table(self, name: str) -> Weight:
        """Return the matrix `name`, of which passes need single rows."""

    def vector(self, name: str) -> Tensor | None:
        """Return a norm, bias or scalar; None when the model has none of this name."""


def build_decoder(
    spec: DecoderSpec,
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = None,
    progress: Progress | None = None,
    kv_dtype: torch.dtype | None = None,
    room: MemoryLimits | None = None,
    pages: ExpertPages | None = None,
) -> Decoder:
    """Build the decoder of `spec` from the tensors of `source`, or from the file of `pages`.

    `quantize`: see `Checkpoint.weight`. With "int4" the embedding and the head take 8 bits, which costs little memory
    and keeps rare tokens apart, unless they were trained for 4; "int4-all" gives them 4 bits too. `progress(name)` is
    called after every tensor.
    `kv_dtype`, `room`: see `Decoder`.

    Raises:
        ValueError: tensors are missing, surplus or misshapen; all of them are listed.
    """
    check_tensors(spec, source)
    return assemble(spec, TensorReader(spec, source, dtype, device, quantize, progress, pages), kv_dtype, room)


def assemble(
    spec: DecoderSpec, read: Reader, kv_dtype: torch.dtype | None = None, room: MemoryLimits | None = None
) -> Decoder:
    """Assemble the decoder that `spec` describes from the tensors of `read`."""
    embedding = read.matrix("embed_tokens.weight")
    norm = read.vector("norm.weight")
    assert norm is not None
    per_layer = None
    if spec.per_layer_input:
        ple_norm = read.vector("per_layer_projection_norm.weight")
        assert ple_norm is not None
        per_layer = PerLayerEmbedding(
            embedding=read.table(PER_LAYER_TABLE),
            projection=Linear(read.matrix("per_layer_model_projection.weight")),
            norm=ple_norm,
            width=spec.per_layer_input,
            eps=spec.norm_eps,
        )
    layers = [build_layer(spec, i, read) for i in range(len(spec.layers))]
    head = embedding if spec.tied_head else read.matrix("lm_head.weight")
    media = None if spec.media is None else build_embedder(spec.media, read, norm)
    return Decoder(spec, embedding, layers, norm, head, per_layer, kv_dtype, room, media)


def build_layer(spec: DecoderSpec, index: int, read: Reader) -> Layer:
    """Build layer `index` of `spec`; a drafter's layers are built with it too."""
    at = f"layers.{index}."

    def linear(name: str) -> Linear:
        return Linear(read.matrix(f"{at}{name}.weight"), read.vector(f"{at}{name}.bias"))

    def norm(name: str) -> Tensor | None:
        return read.vector(f"{at}{name}.weight")

    def needed(name: str) -> Tensor:
        return vector(f"{at}{name}.weight")

    def vector(name: str) -> Tensor:
        found = read.vector(name)
        assert found is not None, name
        return found

    layer = spec.layers[index]
    own_kv = layer.kv_layer is None
    after = "post_attention_layernorm"
    return Layer(
        spec=layer,
        eps=spec.norm_eps,
        scale=spec.attention_scale,
        activation=spec.activation,
        input_norm=needed("input_layernorm"),
        q=linear("self_attn.q_proj"),
        k=linear("self_attn.k_proj") if own_kv else None,
        v=linear("self_attn.v_proj") if own_kv and not layer.values_from_keys else None,
        o=linear("self_attn.o_proj"),
        q_norm=norm("self_attn.q_norm"),
        k_norm=norm("self_attn.k_norm"),
        norm_values=spec.v_norm,
        attention_post_norm=norm(after) if spec.sandwich_norms else None,
        mlp_norm=needed("pre_feedforward_layernorm" if spec.sandwich_norms else after),
        gate=linear("mlp.gate_proj"),
        up=linear("mlp.up_proj"),
        down=linear("mlp.down_proj"),
        mlp_post_norm=norm("post_feedforward_layernorm"),
        ple_gate=linear("per_layer_input_gate") if spec.per_layer_input else None,
        ple_projection=linear("per_layer_projection") if spec.per_layer_input else None,
        ple_norm=norm("post_per_layer_input_norm"),
        scalar=read.vector(f"{at}layer_scalar"),
        experts=None
        if spec.experts is None
        else Experts.read(spec, spec.experts, index, vector, read.matrix, read.pages),
    )


def build_embedder(spec: MediaSpec, read: Reader, like: Tensor) -> MediaEmbedder:
    """Build the embedder of `spec`, whose rows have the dtype and the device of `like`."""

    def vector(name: str) -> Tensor:
        found = read.vector(name)
        assert found is not None, name
        return found

    def norm(name: str) -> LayerNorm:
        return LayerNorm(vector(f"vision_embedder.{name}.weight"), vector(f"vision_embedder.{name}.bias"))

    vision = audio = None
    if spec.vision is not None:
        dense = "vision_embedder.patch_dense"
        vision = VisionEmbedder(
            patch_ln1=norm("patch_ln1"),
            patch_dense=Linear(read.matrix(f"{dense}.weight"), vector(f"{dense}.bias")),
            patch_ln2=norm("patch_ln2"),
            pos_embedding=vector("vision_embedder.pos_embedding"),
            pos_norm=norm("pos_norm"),
            embedding_projection=Linear(read.matrix("embed_vision.embedding_projection.weight")),
            eps=spec.vision.eps,
        )
    if spec.audio is not None:
        projection = Linear(read.matrix("embed_audio.embedding_projection.weight"))
        audio = AudioEmbedder(projection, spec.audio.eps)
    return MediaEmbedder(spec, vision, audio, like.dtype, like.device)


def check_tensors(spec: DecoderSpec, source: Source, more: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Raise a ValueError that lists every missing, surplus and misshapen tensor.

    `more`: canonical names and shapes that are needed besides those of `spec`.
    """
    have = source.checkpoint.shapes()
    want = {source.names[name]: shape for name, shape in {**expected_tensors(spec), **(more or {})}.items()}
    problems = {
        "missing": [f"{one_line(name)} {list(shape)}" for name, shape in want.items() if name not in have],
        "misshapen": [
            f"{one_line(name)} is {list(have[name])}, needs {list(shape)}"
            for name, shape in want.items()
            if name in have and tuple(have[name]) != shape
        ],
        "surplus": [one_line(name) for name in have if name not in want and not ignorable(spec, name)],
    }
    if any(problems.values()):
        parts = [
            f"{len(names)} {kind}: {'; '.join(names[:_LISTED])}{' ...' if len(names) > _LISTED else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise ValueError(
            f"{source.checkpoint.path}: its tensors do not fit a {spec.model_type} decoder of this config. "
            f"{'. '.join(parts)}. Are config and weights of the same model?"
        )
    for name in want:
        source.checkpoint.loaded_bytes(
            name, torch.float32
        )  # raises for a type that is not read, before minutes of work


def storage_of(name: str, quantize: Quantize) -> Storage:
    """Return the storage of the matrix of this canonical name in a model that is quantised with `quantize`.

    An embedder takes 8 bits in every quantised model: it is small, and all that a model sees goes through it. A router
    and an embedder's positions stay floats.
    """
    if name.endswith(("router.proj.weight", "pos_embedding")):
        return "none"
    if is_media(name) and quantize in ("int4", "int4-all"):
        return "int8"
    if quantize == "int4-all":
        return "int4"
    return "int8" if quantize == "int4" and name in ("embed_tokens.weight", "lm_head.weight") else quantize


class TensorReader:
    """Read the tensors of `source`, as a `Reader`; at most one tensor is in memory besides those that it returned."""

    def __init__(
        self,
        spec: DecoderSpec,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        quantize: Quantize,
        progress: Progress | None,
        pages: ExpertPages | None = None,
    ) -> None:
        self.spec, self.source, self.dtype, self.device = spec, source, dtype, device
        self.quantize, self.progress = quantize, progress
        self.wanted, self.pages = expected_tensors(spec), pages
        self._arena = Arena()

    def matrix(self, name: str) -> Weight:
        """Return a matrix on the model's device; on the CPU its blocks lie in the arena, in the order of reading."""
        if self.pages is not None and is_expert_matrix(name):
            self._read(name)
            return self.pages.file.weight(name)
        weight = self.stored(name)
        if self.device.type == "cpu" and weight.packed is not None:  # floats may be another model's own
            return BlockWeight(weight.packed.move(self._arena.place))
        return weight.to(self.device)

    def stored(self, name: str) -> Weight:
        """Return a matrix where the checkpoint's reader left it, on the CPU."""
        storage = storage_of(name, self.quantize)
        weight = self.source.checkpoint.weight(self.source.names[name], self.dtype, storage, self._rows(name))
        self._read(name)
        return weight

    def table(self, name: str) -> Weight:
        """Return a matrix whose rows stay in the checkpoint's file, where that is possible; else the matrix."""
        if not isinstance(self.source.checkpoint, RowSource):
            return self.matrix(name)
        self._read(name)
        return self.source.checkpoint.table(self.source.names[name])

    def vector(self, name: str) -> Tensor | None:
        """Return a norm, bias or scalar in the compute dtype; None when the spec has none of this name."""
        if name not in self.wanted:
            return None
        tensor = self.source.checkpoint.tensor(self.source.names[name])
        if name.endswith("norm.weight"):
            tensor = tensor + self.source.norm_offset
        if (rows := self._rows(name)) is not None:
            tensor = tensor[rows]
        self._read(name)
        return tensor.to(self.device, self.dtype)

    def _rows(self, name: str) -> Tensor | None:
        """Return the row order that undoes llama.cpp's order of q and k: it stores each head as pairs (i, i + D/2) side
        by side."""
        if not self.source.interleaved_rope or not (".q_proj." in name or ".k_proj." in name):
            return None
        dim = self.spec.layers[int(name.split(".")[1])].head_dim
        order = torch.arange(self.wanted[name][0], dtype=torch.int64).view(-1, dim // 2, 2)  # [heads, D / 2, 2]
        return order.transpose(1, 2).reshape(-1)  # [heads * D]

    def _read(self, name: str) -> None:
        if self.progress is not None:
            self.progress(name)
