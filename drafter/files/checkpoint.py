"""From a drafter's checkpoint to a `Drafter`.

What: `load_drafter` reads a Gemma 4 assistant (transformers' `Gemma4AssistantForCausalLM` and
`Gemma4UnifiedAssistantForCausalLM`, as published in safetensors, or as a GGUF file, see `gguf.py`), or a head of our
own format: a folder with `config.json` (sizes, provenance, the backbone's fingerprint) and `mtp.gguf` (matrices of 8, 5
or 4 bits), see `head.py`. `bind` reads the weights, when the backbone's dtype and device are known. Of transformers
only the config class is used: transformers 5.23.0 cannot build the model.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drafter.config import (
    BIGRAM_LEFT,
    BIGRAM_RIGHT,
    CENTROIDS,
    FUSE,
    HEAD_TYPE,
    MODEL_TYPES,
    POST_PROJECTION,
    PRE_PROJECTION,
    TOKEN_ORDERING,
    Config,
    MTPHeadConfig,
    MTPHeadSpec,
    assistant_spec,
    extra_tensors,
    head_spec,
)
from drafter.files.assistant import ABOUT_FILE, assistants_backbone
from drafter.files.find import find_drafter
from drafter.files.gguf import AssistantGGUF, backbone_in
from drafter.files.head import ARCHITECTURE as HEAD_ARCHITECTURE
from drafter.files.head import DRAFT_IDS, HEAD_FILE, check_weights
from drafter.inference import Bigram, CentroidHead, DenseHead, MTPHead, PrunedHead
from drafter.mtp_drafter import MTPDrafter
from specdec.model.build import Source, TensorReader, build_layer, check_tensors
from specdec.model.decoder import Decoder
from specdec.model.spec import DecoderSpec
from specdec.model.stack import Linear, Rotations, Stack
from specdec.weights.checkpoint import Checkpoint
from specdec.weights.gguf.checkpoint import GGUFCheckpoint
from specdec.weights.gguf.kind import architecture
from specdec.weights.hf_config import CONFIG, read_config
from specdec.weights.metadata import Values, naming, one_line, quote, read_object
from specdec.weights.safetensors import SafetensorsCheckpoint
from specdec.weights.tensors import BlockWeight, Storage, Weight


class Stored(NamedTuple):
    """Describe a drafter's folder or GGUF file: `shape` is our `MTPHeadConfig` or transformers' config of an assistant.

    `meant`: fingerprint and name of the backbone that the head was trained for, where the folder names them.
    `draft_ids` [candidates] int64: the tokens of a pruned head.
    """

    path: Path
    shape: MTPHeadConfig | Config
    checkpoint: Checkpoint
    meant: tuple[str, str] | None
    draft_ids: Tensor | None

    def spec(self, backbone: Decoder, strict: bool = True) -> MTPHeadSpec:
        """Return the network's spec, for `backbone`.

        Raises:
            ValueError: the head was made for another backbone (see `load_drafter`).
        """
        with naming(self.path):
            return self._spec(backbone, strict)

    def fit(self, backbone: DecoderSpec) -> MTPHeadSpec:
        """Return the network's spec, for any backbone of the spec `backbone`, whoever the head was trained for.

        Raises:
            ValueError: the head does not fit such a backbone.
        """
        if isinstance(self.shape, MTPHeadConfig):
            return head_spec(self.shape, backbone)
        spec = assistant_spec(self.shape, backbone)
        return self.checkpoint.for_backbone(spec, backbone) if isinstance(self.checkpoint, AssistantGGUF) else spec

    def _spec(self, backbone: Decoder, strict: bool) -> MTPHeadSpec:
        spec = self.fit(backbone.spec)
        if self.meant is not None and backbone.fingerprint != self.meant[0]:
            complaint = f"{self.path}: this head was trained for another model ({self.meant[1]})"
            if strict:
                raise ValueError(
                    f"{complaint}; train one for yours, or load it with strict=False to try it all the same"
                )
            warnings.warn(f"{complaint}; its drafts may all be wrong, which costs time but no word", stacklevel=2)
        return spec


def load_drafter(name_or_path: str | os.PathLike[str], quantize: Storage = None, *, strict: bool = True) -> MTPDrafter:
    """Load a drafter from a folder, a .gguf file or a hub id ("google/gemma-4-12B-it-assistant"), not bound to a
    backbone yet.

    `quantize`: "int4" or "int8" quantise float weights while they stream in, "none" keeps them in the backbone's dtype;
    None: 8 bits when the backbone is quantised, else its dtype. `strict`: False warns, instead of raising an error,
    when a head of our own format or from our own training was trained for another model of the same shape.

    Raises:
        ValueError: nothing is there, or the folder holds no drafter's checkpoint. `bind` finds out whether the drafter
            fits a backbone, and whether its tensors are complete.
    """
    stored = read_stored(name_or_path)

    def build(backbone: Decoder) -> MTPHead:
        storage = quantize
        float_weights = not isinstance(stored.shape, MTPHeadConfig)
        if storage is None and float_weights and isinstance(backbone.layers[0].q.weight, BlockWeight):
            storage = "int8"  # a draft's acceptance is the same at 8 bits, and the head is most of its cost
        with naming(stored.path):
            return build_assistant(
                stored.spec(backbone, strict),
                stored.checkpoint,
                backbone.dtype,
                backbone.device,
                storage,
                draft_ids=stored.draft_ids,
                vocab=backbone.spec.vocab_size,
            )

    return MTPDrafter(build)


def stored_bytes(name_or_path: str | os.PathLike[str], dtype: torch.dtype, quantized: bool) -> int:
    """Return the bytes that the weights of a drafter take, bound to a backbone in `dtype`, `quantized` or not."""
    stored = read_stored(name_or_path)
    quantize: Storage = "int8" if quantized and not isinstance(stored.shape, MTPHeadConfig) else None
    return sum(stored.checkpoint.loaded_bytes(name, dtype, quantize) for name in stored.checkpoint.shapes())


def weights_state(name_or_path: str | os.PathLike[str]) -> str:
    """Return names, sizes and times of a drafter's files of weights: other weights have another state.

    A hash of the weights would take longer than what is to be saved by knowing them.
    """
    return files_state(read_stored(name_or_path).path)


def files_state(path: Path) -> str:
    """Return names, sizes and times of the files of weights at `path`, a file or a folder."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".gguf", ".safetensors"))
    return repr([(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in (file.stat(),)])


def read_stored(name_or_path: str | os.PathLike[str]) -> Stored:
    """Read a drafter's folder, GGUF file or hub id, without its weights.

    Raises:
        ValueError: see `load_drafter`.
    """
    found = find_drafter(name_or_path)
    if found.is_file():
        with naming(found):
            if architecture(found) != HEAD_ARCHITECTURE:
                assistant = AssistantGGUF(found)
                return Stored(found, assistant.config, assistant, backbone_in(assistant.metadata), None)
    folder = found.parent if found.is_file() else found  # our own heads' weights lie beside their config
    with naming(folder):
        values = _config_json(folder)
        if values["model_type"] == HEAD_TYPE:
            return _own(folder, values)
        checkpoint = SafetensorsCheckpoint(folder)
        config = read_config(folder, len(checkpoint.shapes()), MODEL_TYPES)
        return Stored(folder, config, checkpoint, assistants_backbone(folder), None)


def provenance_of(path: Path) -> Any:
    """Return how the head in a folder or GGUF file was made, as it says; None where it does not say.

    `path` is one that `read_stored` has found.
    """
    files = [file for name in (ABOUT_FILE, CONFIG) if (file := path / name).is_file()]
    told = (read_object(path).get("provenance") for path in files)
    return next(filter(None, told), None)


def _own(folder: Path, values: dict[str, Any]) -> Stored:
    try:
        config = MTPHeadConfig.from_dict(values)
        backbone = Values(values).inner("backbone")
        meant = (backbone.text("fingerprint"), one_line(backbone.text("name", default="unnamed")))
        check_weights(folder, values)
        file = GGUFCheckpoint(folder / HEAD_FILE)
        metadata = Values(file.header.metadata)
        ids = torch.tensor(metadata.wholes(DRAFT_IDS), dtype=torch.int64) if metadata.has(DRAFT_IDS) else None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: not a complete head ({error}); copy the folder again, or train it again"
        ) from error
    return Stored(folder, config, file, meant, ids)


def _config_json(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: an adapter (LoRA), which drafts nothing: name it with adapter= (--adapter)")
    try:
        values = read_object(folder / CONFIG)
        kind = Values(values).text("model_type", default="")
    except ValueError as error:
        raise ValueError(
            f"{folder}: no readable config.json ({error}); a drafter's folder holds it, and its weights"
        ) from error
    if kind not in (*MODEL_TYPES, HEAD_TYPE):
        raise ValueError(
            f"{folder}: a {quote(kind)} checkpoint is not a drafter; drafters are of type "
            f"{', '.join((*MODEL_TYPES, HEAD_TYPE))}"
        )
    return values


def checked_source(spec: MTPHeadSpec, checkpoint: Checkpoint) -> Source:
    """Return the source of the head of `spec`, all of whose tensors are in `checkpoint`. Raises ValueError: tensors are
    missing, surplus or misshapen."""
    more = extra_tensors(spec)
    names = {**Source.huggingface(checkpoint, spec.text).names, **{name: name for name in more}}
    source = Source(checkpoint, names, 0.0, False)
    check_tensors(spec.text, source, more)
    return source


def build_assistant(
    spec: MTPHeadSpec,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Storage = None,
    *,
    draft_ids: Tensor | None = None,
    vocab: int = 0,
) -> MTPHead:
    """Build the head of `spec` from all its tensors in `checkpoint`; `quantize`: see `Checkpoint.weight`.

    `draft_ids` [candidates] int64: the tokens of a pruned head, out of `vocab`.

    Raises:
        ValueError: tensors are missing, surplus or misshapen (all are listed), or a list of tokens is damaged.
    """
    text = spec.text
    source = checked_source(spec, checkpoint)
    read = TensorReader(text, source, dtype, device, quantize, None)
    norm = read.vector("norm.weight")
    assert norm is not None
    weight = read.matrix("embed_tokens.weight" if text.tied_head else "lm_head.weight")
    head: DenseHead | PrunedHead | CentroidHead = DenseHead(weight)
    if spec.pruned:
        head = _pruned_head(spec, weight, read, checkpoint, draft_ids, vocab)
    elif spec.centroids:
        head = _centroid_head(spec, weight, read, checkpoint)
    layers = [build_layer(text, i, read) for i in range(len(text.layers))]
    stores = [layer.spec.kv_layer for layer in layers if layer.spec.kv_layer is not None]
    return MTPHead(
        spec=spec,
        pre=Linear(read.matrix(PRE_PROJECTION)),
        stack=Stack(layers, stores, norm, text.norm_eps),
        post=Linear(read.matrix(POST_PROJECTION)),
        head=head,
        rotations=Rotations(text.ropes, dtype, device),
        fuse=Linear(read.matrix(FUSE)) if spec.aux_layers else None,
    )


def _pruned_head(
    spec: MTPHeadSpec,
    weight: Weight,
    read: TensorReader,
    checkpoint: Checkpoint,
    ids: Tensor | None,
    vocab: int,
) -> PrunedHead:
    count = spec.text.vocab_size
    if (
        ids is None
        or ids.shape != (count,)
        or bool((ids.diff() <= 0).any())
        or not 0 <= int(ids[0]) <= int(ids[-1]) < vocab
    ):
        raise ValueError(f"{checkpoint.path}: does not list its {count} draft tokens in order; fetch or train it again")
    if not spec.bigram:
        return PrunedHead(weight, ids.to(read.device))
    slots = torch.full((vocab,), count, dtype=torch.int64)  # what cannot be drafted shares the last row
    slots[ids] = torch.arange(count, dtype=torch.int64)
    left = checkpoint.tensor(BIGRAM_LEFT).to(read.device, read.dtype)  # [candidates + 1, rank]
    return PrunedHead(weight, ids.to(read.device), Bigram(left, slots.to(read.device), read.matrix(BIGRAM_RIGHT)))


def _centroid_head(spec: MTPHeadSpec, weight: Weight, read: TensorReader, checkpoint: Checkpoint) -> CentroidHead:
    ordering = checkpoint.tensor(TOKEN_ORDERING).long()  # [vocab]: token ids, cluster after cluster
    if not torch.equal(ordering.sort().values, torch.arange(len(ordering), dtype=torch.int64)):
        raise ValueError(f"{checkpoint.path}: {TOKEN_ORDERING} does not list every token once; fetch it again")
    clusters = ordering.view(spec.centroids, -1).to(read.device)  # [centroids, vocab / centroids]
    return CentroidHead(weight, read.matrix(CENTROIDS), clusters, spec.top_centroids)
