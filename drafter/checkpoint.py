"""From a drafter's checkpoint to a `Drafter`.

What: `load_drafter` reads the config of a Gemma 4 assistant (transformers' `Gemma4AssistantForCausalLM` and
`Gemma4UnifiedAssistantForCausalLM`, as published in safetensors). Its weights are read at `bind`, when the
backbone's dtype and device are known. Of transformers only the config class is used: 5.23.0 cannot build the
model. Left out: GGUF files of drafters.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from transformers import AutoConfig

from drafter.head import Assistant, AssistantSpec, CentroidHead, Config, DenseHead, assistant_spec
from drafter.propose import AssistantDrafter
from specdec.model.build import Source, TensorReader, build_layer, check_tensors
from specdec.model.decoder import Decoder, Linear, Rotations, Stack
from specdec.weights.hub import model_path
from specdec.weights.safetensors import SafetensorsCheckpoint
from specdec.weights.tensors import BlockWeight, Storage

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")

_PRE, _POST = "pre_projection.weight", "post_projection.weight"
_CENTROIDS, _ORDERING = "masked_embedding.centroids.weight", "masked_embedding.token_ordering"


def load_drafter(name_or_path: str | os.PathLike[str], quantize: Storage = None) -> AssistantDrafter:
    """A drafter from a folder or hub id ("google/gemma-4-12B-it-assistant"), not bound to a backbone yet.

    `quantize`: "int4" or "int8" quantise the weights while they stream in, "none" keeps them in the backbone's
    dtype; None: 8 bits when the backbone is quantised, else its dtype.

    Raises:
        ValueError: nothing is there, or it is not the checkpoint of an assistant. Whether it fits a backbone,
            and whether its tensors are complete, is found out by `bind`.
    """
    folder = model_path(name_or_path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: drafters are read from safetensors; name such a folder, or a hub id")
    config = _config(folder)
    checkpoint = SafetensorsCheckpoint(folder)

    def build(backbone: Decoder) -> Assistant:
        spec = assistant_spec(config, backbone.spec)
        storage = quantize
        if storage is None and isinstance(backbone.layers[0].q.weight, BlockWeight):
            storage = "int8"  # a draft's acceptance is the same at 8 bits, and the head is most of its cost
        return build_assistant(spec, checkpoint, backbone.dtype, backbone.device, storage)

    return AssistantDrafter(build)


def _config(folder: Path) -> Config:
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder}: no readable config.json ({error}); a drafter's folder holds it, and *.safetensors"
        ) from error
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{folder}: a {kind!r} checkpoint is not a drafter; drafters are of type {', '.join(MODEL_TYPES)}"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' validation raises kinds of its own
        raise ValueError(f"{folder}: transformers cannot read the {kind} config ({error})") from error


def extra_tensors(spec: AssistantSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what an assistant has besides a decoder's tensors."""
    text = spec.text
    shapes: dict[str, tuple[int, ...]] = {
        _PRE: (text.hidden_size, 2 * spec.backbone_hidden_size),
        _POST: (spec.backbone_hidden_size, text.hidden_size),
    }
    if spec.centroids:
        shapes[_CENTROIDS] = (spec.centroids, text.hidden_size)
        shapes[_ORDERING] = (text.vocab_size,)
    return shapes


def build_assistant(
    spec: AssistantSpec,
    checkpoint: SafetensorsCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Storage = None,
) -> Assistant:
    """Read every tensor of `spec` from `checkpoint`; `quantize`: see `Checkpoint.weight`.

    Raises:
        ValueError: tensors are missing, surplus or misshapen (all are listed), or the ordering is damaged.
    """
    text, more = spec.text, extra_tensors(spec)
    plain = Source.huggingface(checkpoint, text)
    source = Source(checkpoint, {**plain.names, **{name: name for name in more}}, 0.0, False)
    check_tensors(text, source, more)
    read = TensorReader(text, source, dtype, device, quantize, None)
    norm = read.vector("norm.weight")
    assert norm is not None
    head = DenseHead(read.matrix("embed_tokens.weight" if text.tied_head else "lm_head.weight"))
    layers = [build_layer(text, i, read) for i in range(len(text.layers))]
    stores = [layer.spec.kv_layer for layer in layers if layer.spec.kv_layer is not None]
    return Assistant(
        spec=spec,
        pre=Linear(read.matrix(_PRE)),
        stack=Stack(layers, stores, norm, text.norm_eps),
        post=Linear(read.matrix(_POST)),
        head=_centroid_head(spec, head, read, checkpoint) if spec.centroids else head,
        rotations=Rotations(text.ropes, dtype, device),
    )


def _centroid_head(
    spec: AssistantSpec, dense: DenseHead, read: TensorReader, checkpoint: SafetensorsCheckpoint
) -> CentroidHead:
    ordering = checkpoint.tensor(_ORDERING).long()  # [vocab]: token ids, cluster after cluster
    if not torch.equal(ordering.sort().values, torch.arange(len(ordering))):
        raise ValueError(f"{checkpoint.path}: {_ORDERING} does not list every token once; fetch the checkpoint again")
    clusters = ordering.view(spec.centroids, -1).to(read.device)  # [centroids, vocab / centroids]
    return CentroidHead(dense.weight, read.matrix(_CENTROIDS), clusters, spec.top_centroids)
