"""The inputs of multimodal models, as transformers' processors name and shape them: checked, and cut into media.

What: `MediaInputs`, and one `Medium` for each picture, frame and clip. Pixels and samples stay where the caller has
them: a medium looks at them when it is hashed, and again when it is embedded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.model.embedder.embedder import MediaEmbedder


@dataclass(frozen=True)
class MediaInputs:
    """Hold the inputs of a multimodal model besides token ids.

    Pictures: pixel values [pictures, budget, patch] and positions [pictures, budget, 2], -1 for padding. Frames of all
    videos: the same, and the number of frames of each video. Sound: frames [clips, longest, samples], and the mask
    [clips, longest] of those that are there. `mm_token_type_ids` [rows, n]: 1 for soft tokens of pictures, 2 of videos,
    3 of sound. `mm_encoder_outputs`: pictures and videos that transformers has embedded already.
    """

    pixel_values: Tensor | None = None
    image_position_ids: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_position_ids: Tensor | None = None
    num_frames_per_video: Tensor | None = None
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None
    mm_token_type_ids: Tensor | None = None
    mm_encoder_outputs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> MediaInputs:
        """Return the media inputs among `inputs`."""
        return cls(**{name: inputs[name] for name in MEDIA_INPUTS if inputs.get(name) is not None})

    @property
    def given(self) -> str | None:
        """Return the name of the first input that says that there are media; None where there are none."""
        for name in ("pixel_values", "pixel_values_videos", "input_features"):
            if getattr(self, name) is not None:
                return name
        if self.mm_token_type_ids is not None and bool(torch.as_tensor(self.mm_token_type_ids).any()):
            return "mm_token_type_ids"
        return "mm_encoder_outputs" if self.mm_encoder_outputs else None


MEDIA_INPUTS = tuple(field.name for field in fields(MediaInputs))


class Medium(NamedTuple):
    """Hold a picture, frame or clip: its soft tokens, what tells it from others, and the means to embed it."""

    tokens: int
    key: bytes
    rows: Callable[[], Tensor]


def pictures(inputs: MediaInputs, embedder: MediaEmbedder) -> list[Medium] | None:
    """Return the pictures of `inputs`; None where it has none. Raises ValueError for shapes and positions that are no
    picture's."""
    return _pictures(inputs, "pixel_values", "image_position_ids", embedder)


def frames(inputs: MediaInputs, embedder: MediaEmbedder) -> list[Medium] | None:
    """Return the frames of all videos of `inputs`, as `pictures` does."""
    found = _pictures(inputs, "pixel_values_videos", "video_position_ids", embedder)
    if found is not None and inputs.num_frames_per_video is not None:
        told = int(torch.as_tensor(inputs.num_frames_per_video).sum())
        if len(found) != told:
            raise ValueError(f"pixel_values_videos has {len(found)} frames, and num_frames_per_video says {told}")
    return found


def clips(inputs: MediaInputs, embedder: MediaEmbedder) -> list[Medium] | None:
    """Return the clips of `inputs`; None where it has none. Raises ValueError for shapes that are no clip's."""
    if inputs.input_features is None:
        return None
    audio = embedder.spec.audio
    if audio is None:
        raise ValueError(no_embedder("input_features"))
    if inputs.input_features_mask is None:
        raise ValueError(
            "input_features needs input_features_mask, which says how long each clip is; pass all that the processor "
            "made"
        )
    features, mask = torch.as_tensor(inputs.input_features), torch.as_tensor(inputs.input_features_mask).bool()
    if features.dim() != 3 or features.shape[2] != audio.frame or mask.shape != features.shape[:2]:
        raise ValueError(
            f"input_features must be [clips, frames, {audio.frame}] and input_features_mask [clips, frames], got "
            f"{list(features.shape)} and {list(mask.shape)}; another model's processor makes other features"
        )

    def clip(samples: Tensor, there: Tensor) -> Medium:
        (samples,) = _kept(there, samples)
        return Medium(len(samples), hash_of(embedder.identity, samples), lambda: embedder.frames(samples))

    return [clip(*one) for one in zip(features, mask, strict=True)]


def no_embedder(name: str) -> str:
    """Return the message for an input `name` of media that the model cannot embed."""
    return (
        f"{name}: this model was loaded without an embedder of such input. A folder of Gemma 4 12B needs the tensors "
        "vision_embedder.* and embed_vision.* for pictures and videos, embed_audio.* for sound; a .gguf file needs its "
        "mmproj-*.gguf in the same folder. Images and sound of other models are not supported: pass text only"
    )


def hash_of(identity: str, *tensors: Tensor) -> bytes:
    """Return a hash of `identity`, and of the shapes and values of `tensors`."""
    digest = hashlib.sha256(identity.encode())
    for tensor in tensors:
        kind = torch.float32 if tensor.is_floating_point() else torch.int64
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", kind).contiguous().numpy().data)
    return digest.digest()


def _pictures(inputs: MediaInputs, argument: str, where: str, embedder: MediaEmbedder) -> list[Medium] | None:
    pixels, positions = getattr(inputs, argument), getattr(inputs, where)
    if pixels is None:
        return None
    vision = embedder.spec.vision
    if vision is None:
        raise ValueError(no_embedder(argument))
    if positions is None:
        raise ValueError(f"{argument} needs {where}, which says where each patch is; pass all that the processor made")
    pixels, positions = torch.as_tensor(pixels), torch.as_tensor(positions)
    if pixels.dim() != 3 or pixels.shape[2] != vision.patch or positions.shape != (*pixels.shape[:2], 2):
        raise ValueError(
            f"{argument} must be [pictures, patches, {vision.patch}] and {where} [pictures, patches, 2], got "
            f"{list(pixels.shape)} and {list(positions.shape)}; another model's processor cuts other patches"
        )
    if positions.numel() and not -1 <= int(positions.min()) <= int(positions.max()) < vision.positions:
        raise ValueError(f"{where} must lie in 0..{vision.positions - 1}, or be -1 for padding")

    def picture(patches: Tensor, at: Tensor) -> Medium:
        patches, at = _kept((at != -1).all(dim=-1), patches, at)
        if len(at) > vision.positions:  # the memory of a pass is planned for the largest budget
            raise ValueError(f"{argument}: a picture of {len(at)} patches; the largest one has {vision.positions}")
        return Medium(len(at), hash_of(embedder.identity, patches, at), lambda: embedder.patches(patches, at))

    return [picture(*one) for one in zip(pixels, positions, strict=True)]


def _kept(there: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of `tensors` where `there` [n] is true: views where all padding is at the end."""
    count = int(there.sum())
    if bool(there[:count].all()):
        return tuple(tensor[:count] for tensor in tensors)
    return tuple(tensor[there.to(tensor.device)] for tensor in tensors)
