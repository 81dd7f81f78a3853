"""A tiny random multimodal model, as folder and as GGUF with its mmproj file, and inputs as a processor makes them.

Patches stay 6,912 numbers wide and frames 640, as no config says otherwise; everything else is tiny.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tests.support.tiny import FAMILIES, SHAPE, tiny_model

PATCH, FRAME, SIDE, CHANNELS = 6912, 640, 48, 3
WIDTH = 32
TOKENS = {
    "image_token_id": 240,
    "audio_token_id": 241,
    "video_token_id": 242,
    "boi_token_id": 243,
    "eoi_token_id": 244,
    "boa_token_id": 245,
    "eoa_token_index": 246,
}
IMAGE, AUDIO, VIDEO, BOI, EOI, BOA, EOA = TOKENS.values()
SPELLED = {
    IMAGE: "<|image|>", AUDIO: "<|audio|>", VIDEO: "<|video|>",
    BOI: "<|image>", EOI: "<image|>", BOA: "<|audio>", EOA: "<audio|>",
}  # fmt: skip


@cache
def tiny_media_model(seed: int = 0) -> PreTrainedModel:
    """Transformers' whole model, in float32. Shared: do not change it."""
    _, _, arguments = FAMILIES["gemma4_unified"]
    text = transformers.Gemma4UnifiedTextConfig(**{**SHAPE, **arguments})
    vision = transformers.Gemma4UnifiedVisionConfig(mm_embed_dim=WIDTH, output_proj_dims=WIDTH)
    config = transformers.Gemma4UnifiedConfig(
        text_config=text, vision_config=vision, audio_config=transformers.Gemma4UnifiedAudioConfig(), **TOKENS
    )
    config._attn_implementation = "eager"
    decoder = dict(tiny_model("gemma4_unified").model.named_parameters())
    torch.manual_seed(seed)
    model = transformers.Gemma4UnifiedForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (own := decoder.get(name.removeprefix("model.language_model."))) is not None:
                parameter.copy_(own)
                continue
            norm = "norm" in name or "_ln" in name
            scale = 0.3 if norm else 0.5 if parameter.ndim == 3 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + float(norm and name.endswith("weight")))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.9)
    # Soft tokens are not answers; without this a random model repeats them.
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=2, eos_token_id=None, suppress_tokens=list(TOKENS.values())
    )
    return model


def picture(columns: int, rows: int, seed: int = 0, budget: int = 70) -> tuple[Tensor, Tensor]:
    """Pixel values [budget, 6912] and positions [budget, 2] of a random picture of so many patches."""
    generator = torch.Generator().manual_seed(seed)
    count = columns * rows
    pixels = torch.zeros(budget, PATCH)
    pixels[:count] = torch.rand(count, PATCH, generator=generator)
    positions = torch.full((budget, 2), -1)
    grid = torch.arange(count)
    positions[:count] = torch.stack((grid % columns, grid // columns), dim=1)
    return pixels, positions


def pictures(*sizes: tuple[int, int], seed: int = 0, video: bool = False) -> dict[str, Tensor]:
    """The inputs of several pictures, or of the frames of one video, of (columns, rows) patches each."""
    made = [picture(*size, seed=seed + i) for i, size in enumerate(sizes)]
    pixels, positions = torch.stack([p for p, _ in made]), torch.stack([at for _, at in made])
    if not video:
        return {"pixel_values": pixels, "image_position_ids": positions}
    frames = torch.tensor([len(sizes)])
    return {"pixel_values_videos": pixels, "video_position_ids": positions, "num_frames_per_video": frames}


def clips(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """The inputs of several clips of so many frames."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    features, mask = torch.zeros(len(lengths), longest, FRAME), torch.zeros(len(lengths), longest, dtype=torch.bool)
    for i, length in enumerate(lengths):
        features[i, :length] = torch.randn(length, FRAME, generator=generator) * 0.1
        mask[i, :length] = True
    return {"input_features": features, "input_features_mask": mask}


def soft(token: int, count: int) -> list[int]:
    """The placeholders of one picture, frame or clip, with the tokens around them."""
    begin, end = (BOA, EOA) if token == AUDIO else (BOI, EOI)
    return [begin, *[token] * count, end]


def prompt_ids(*parts: Any) -> Tensor:
    """Token ids [1, n] of numbers and lists of numbers."""
    flat = [token for part in parts for token in (part if isinstance(part, list) else [part])]
    return torch.tensor([flat])


def token_types(ids: Tensor) -> Tensor:
    """`mm_token_type_ids` of token ids."""
    return (ids == IMAGE) * 1 + (ids == VIDEO) * 2 + (ids == AUDIO) * 3


def padded(*rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [1, n] as a batch with padding on the left, and its mask."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.cat((row.new_zeros(1, longest - row.shape[1]), row), dim=1) for row in rows])
    mask = torch.cat([(torch.arange(longest) >= longest - row.shape[1]).long()[None] for row in rows])
    return ids, mask


def write_mmproj(
    path: Path, kind: GGMLQuantizationType, patches: GGMLQuantizationType | None = None, **changes: Any
) -> Path:
    """`tiny_media_model()`'s embedder as llama.cpp's converter writes it: planar patches, a table for each axis.

    `kind` of the projections, `patches` of the patch matrix (float32 by default); `changes` to the metadata.
    """
    writer = GGUFWriter(path, "clip")
    metadata: dict[str, Any] = {
        "clip.has_vision_encoder": True,
        "clip.has_audio_encoder": True,
        "clip.vision.projector_type": "gemma4uv",
        "clip.audio.projector_type": "gemma4ua",
        "clip.vision.patch_size": 16,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.audio.embedding_length": FRAME,
        **changes,
    }
    for key, value in metadata.items():
        add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    state = tiny_media_model().model.embed_vision.state_dict()
    planar = torch.arange(PATCH).view(SIDE, SIDE, CHANNELS).permute(2, 0, 1).reshape(-1)
    projected = "multimodal_embedder.embedding_projection.weight"
    arrays: dict[str, tuple[Tensor, GGMLQuantizationType | None]] = {
        "v.patch_norm.1.weight": (state["patch_ln1.weight"][planar], None),
        "v.patch_norm.1.bias": (state["patch_ln1.bias"][planar], None),
        "v.patch_embd.weight": (state["patch_dense.weight"][:, planar], patches),
        "v.patch_embd.bias": (state["patch_dense.bias"], None),
        "v.patch_norm.2.weight": (state["patch_ln2.weight"], None),
        "v.patch_norm.2.bias": (state["patch_ln2.bias"], None),
        "v.patch_norm.3.weight": (state["pos_norm.weight"], None),
        "v.patch_norm.3.bias": (state["pos_norm.bias"], None),
        "v.position_embd.weight": (state["pos_embedding"].transpose(0, 1), None),
        "mm.input_projection.weight": (state[projected], kind),
        "mm.a.input_projection.weight": (tiny_media_model().model.embed_audio.embedding_projection.weight, kind),
    }
    for name, (tensor, stored) in arrays.items():
        array = np.ascontiguousarray(tensor.detach().float().numpy())
        if stored is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
