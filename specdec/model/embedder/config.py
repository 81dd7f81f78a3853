"""From a multimodal transformers config to a `MediaSpec`: Gemma 4's "unified" models, whose embedder has no encoder.

A GGUF model and its mmproj file become such a config first, so that one reading serves both formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING

from specdec.model.embedder.spec import CHANNELS, AudioSpec, MediaSpec, MediaTokens, VisionSpec
from specdec.weights.gguf.mmproj import ARCHITECTURE
from specdec.weights.metadata import Values, foreign

UNIFIED = "gemma4_unified"
_SIDE = 1 << 12  # pixels of a patch's side, and samples of a frame: no model has more
_EPSILON = (0.0, 1.0)
_TOKENS = {
    "image": "image_token_id",
    "video": "video_token_id",
    "audio": "audio_token_id",
    "image_begin": "boi_token_id",
    "image_end": "eoi_token_id",
    "audio_begin": "boa_token_id",
    "audio_end": "eoa_token_index",
}


def media_spec(config: Any, hidden: int, vocabulary: int) -> MediaSpec | None:
    """Return the embedder that a config describes, for a decoder of `hidden` numbers and `vocabulary` tokens.

    None for a config of text alone, and of models whose pictures go through an encoder. Raises ValueError for values
    that no model has.
    """
    if getattr(config, "model_type", None) != UNIFIED:
        return None
    values = Values(config)
    ids = {name: values.whole(key, 0) for name, key in _TOKENS.items() if values.has(key)}
    tokens = MediaTokens(**{name: token for name, token in ids.items() if token < vocabulary})
    vision, audio = None, None
    if values.has("vision_config") and tokens.image is not None:
        vision = _vision(Values(config.vision_config))
    if values.has("audio_config") and tokens.audio is not None:
        part = Values(config.audio_config)
        audio = AudioSpec(part.whole("audio_embed_dim", 1, _SIDE), part.number("rms_norm_eps", *_EPSILON))
    return None if vision is None and audio is None else MediaSpec(hidden, vision, audio, tokens)


def _vision(values: Values) -> VisionSpec:
    side = values.whole("patch_size", 1, _SIDE) * values.whole("pooling_kernel_size", 1, _SIDE)
    width = values.whole("mm_embed_dim", 1)
    if (projected := values.whole("output_proj_dims", 1)) != width:
        raise ValueError(f"vision_config has mm_embed_dim {width} and output_proj_dims {projected}; they must be equal")
    if side > _SIDE:
        raise ValueError(f"vision_config has patches of {side} pixels a side; no model has more than {_SIDE}")
    return VisionSpec(side, width, values.whole("mm_posemb_size", 1), values.number("rms_norm_eps", *_EPSILON))


SPELLED = {
    "image": "<|image|>",
    "video": "<|video|>",
    "audio": "<|audio|>",
    "image_begin": "<|image>",
    "image_end": "<image|>",
    "audio_begin": "<|audio>",
    "audio_end": "<audio|>",
}
"""The texts of the tokens in a vocabulary: llama.cpp's files have these where transformers' have ids."""


def with_mmproj(
    config: Any, vocabulary: Sequence[str], metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Any:
    """Return the multimodal config of a text config, of a vocabulary with media tokens, and of an mmproj file.

    `metadata`, `shapes`: the file's, by canonical name. Raises ValueError for values that no model has.
    """
    ids = {token: number for number, token in enumerate(vocabulary) if token in SPELLED.values()}
    parts: dict[str, Any] = {_TOKENS[name]: ids.get(token) for name, token in SPELLED.items()}
    if len(patches := shapes.get("vision_embedder.patch_dense.weight", ())) == 2:
        values = Values(metadata, f"{ARCHITECTURE}.vision.")
        patch = values.whole("patch_size", 1, _SIDE)
        table = shapes.get("vision_embedder.pos_embedding", (0,))
        parts["vision_config"] = {
            "patch_size": patch,
            "pooling_kernel_size": round((patches[1] / CHANNELS) ** 0.5) // patch,
            "mm_embed_dim": patches[0],
            "output_proj_dims": patches[0],
            "mm_posemb_size": table[0],
            "rms_norm_eps": values.number("attention.layer_norm_epsilon", *_EPSILON, default=1e-6),
        }
    if len(frames := shapes.get("embed_audio.embedding_projection.weight", ())) == 2:
        values = Values(metadata, f"{ARCHITECTURE}.audio.")
        epsilon = values.number("attention.layer_norm_epsilon", *_EPSILON, default=1e-6)
        parts["audio_config"] = {"audio_embed_dim": frames[1], "rms_norm_eps": epsilon}
    text = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    with foreign("the GGUF file's metadata"):
        return CONFIG_MAPPING[UNIFIED](text_config=CONFIG_MAPPING[f"{UNIFIED}_text"](**text), **parts)
