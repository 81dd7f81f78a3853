"""A file or folder in, what it describes out: a model's spec and config, and a source of its weights, still unread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from specdec.model.build import Source
from specdec.model.embedder.config import with_mmproj
from specdec.model.families import decoder_spec, supported_families
from specdec.model.gguf_config import config_from_gguf, with_rope_divisors
from specdec.model.names import with_present_media
from specdec.model.spec import DecoderSpec
from specdec.weights.checkpoint import Checkpoint, JoinedCheckpoint
from specdec.weights.gguf.checkpoint import GGUFCheckpoint
from specdec.weights.gguf.kind import check_is_model, is_gguf
from specdec.weights.gguf.mmproj import mmproj_for
from specdec.weights.gguf.tokenizer import vocabulary
from specdec.weights.hf_config import CONFIG, read_config, read_generation_config
from specdec.weights.hub.folder import companions
from specdec.weights.metadata import naming
from specdec.weights.safetensors import SafetensorsCheckpoint
from specdec.weights.tokenizer import generation_config_from_gguf


def open_checkpoint(path: Path) -> tuple[DecoderSpec, Source, Any, GenerationConfig]:
    """Return spec, source, config and generation config of a .gguf file or a Hugging Face folder; weights stay unread.

    Raises ValueError, naming the file, when it is damaged or describes no model that is supported.
    """
    with naming(path):
        if is_gguf(path):
            return _open_gguf(GGUFCheckpoint(path))
        checkpoint = SafetensorsCheckpoint(path)  # first: its tensors bound the config's numbers
        config = read_config(path, len(checkpoint.shapes()), supported_families())
        with naming(path / CONFIG):
            spec = with_present_media(decoder_spec(config), checkpoint.shapes())
        return spec, Source.huggingface(checkpoint, spec), config, read_generation_config(path, config)


def _open_gguf(file: GGUFCheckpoint) -> tuple[DecoderSpec, Source, Any, GenerationConfig]:
    check_is_model(file.path)
    metadata, shapes = file.header.metadata, file.shapes()
    config = config_from_gguf(metadata, shapes)
    spec = decoder_spec(config)
    if "rope_freqs.weight" in shapes:
        spec = with_rope_divisors(spec, file.tensor("rope_freqs.weight"))
    elif spec.model_type == "gemma4_text":
        raise ValueError(f"{file.path}: has no rope_freqs.weight, without which Gemma 4's rope is unknown")
    checkpoint: Checkpoint = file
    if spec.model_type == "gemma4_text" and not spec.per_layer_input:
        mmproj = mmproj_for(companions(file.path).embedders, spec.hidden_size)
        if mmproj is not None:
            with naming(mmproj.path):
                config = with_mmproj(config, vocabulary(metadata)[0], mmproj.metadata, mmproj.shapes())
                seeing = decoder_spec(config)
                spec = replace(spec, media=seeing.media, media_ids=seeing.media_ids)
            checkpoint = JoinedCheckpoint(file, mmproj)
    return spec, Source.gguf(checkpoint, spec), config, generation_config_from_gguf(metadata)
