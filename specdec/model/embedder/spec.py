"""An embedder as data: sizes of its matrices, and the token ids that stand for media in a prompt.

Left out: encoders with attention (the towers of smaller Gemma 4 models and of Gemma 3). A model with one reads text
here.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

CHANNELS = 3  # of a pixel: red, green, blue


@dataclass(frozen=True)
class VisionSpec:
    """Describe what makes a row of a picture: a patch of `side` x `side` pixels becomes `width` numbers, then the
    hidden size.

    `positions`: rows of the table of positions, for each axis. `eps`: of the norm before the last product.
    """

    side: int
    width: int
    positions: int
    eps: float

    @property
    def patch(self) -> int:
        """Return the numbers in a patch: rows of pixels, channel fastest."""
        return self.side * self.side * CHANNELS


@dataclass(frozen=True)
class AudioSpec:
    """Describe what makes a row of sound: a frame of so many samples becomes the hidden size. `eps`: of the norm before
    it."""

    frame: int
    eps: float


@dataclass(frozen=True)
class MediaTokens:
    """Hold the token ids that stand for media in a prompt; None where the model has no such token.

    `image`, `video` and `audio` are soft tokens, one for each row. The others stand before and after them.
    """

    image: int | None = None
    video: int | None = None
    audio: int | None = None
    image_begin: int | None = None
    image_end: int | None = None
    audio_begin: int | None = None
    audio_end: int | None = None

    @property
    def ids(self) -> frozenset[int]:
        """Return all token ids that stand for media: no drafter proposes them."""
        found = (self.image, self.video, self.audio, self.image_begin, self.image_end, self.audio_begin, self.audio_end)
        return frozenset(token for token in found if token is not None)


@dataclass(frozen=True)
class MediaSpec:
    """Describe a whole embedder. `vision` or `audio` is None where the model cannot embed pictures, or sound."""

    hidden: int
    vision: VisionSpec | None
    audio: AudioSpec | None
    tokens: MediaTokens

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by canonical name: that of a published checkpoint without "model."."""
        shapes: dict[str, tuple[int, ...]] = {}
        if (vision := self.vision) is not None:
            shapes |= {
                "vision_embedder.patch_ln1.weight": (vision.patch,),
                "vision_embedder.patch_ln1.bias": (vision.patch,),
                "vision_embedder.patch_dense.weight": (vision.width, vision.patch),
                "vision_embedder.patch_dense.bias": (vision.width,),
                "vision_embedder.patch_ln2.weight": (vision.width,),
                "vision_embedder.patch_ln2.bias": (vision.width,),
                "vision_embedder.pos_embedding": (vision.positions, 2, vision.width),
                "vision_embedder.pos_norm.weight": (vision.width,),
                "vision_embedder.pos_norm.bias": (vision.width,),
                "embed_vision.embedding_projection.weight": (self.hidden, vision.width),
            }
        if (audio := self.audio) is not None:
            shapes["embed_audio.embedding_projection.weight"] = (self.hidden, audio.frame)
        return shapes

    def of_parts(self, vision: bool, audio: bool) -> MediaSpec | None:
        """Return the spec with the asked parts alone; None where none is left."""
        left = replace(self, vision=self.vision if vision else None, audio=self.audio if audio else None)
        return None if left.vision is None and left.audio is None else left


def is_media(canonical: str) -> bool:
    """Return whether the tensor of this canonical name belongs to an embedder."""
    return canonical.startswith(("vision_embedder.", "embed_vision.", "embed_audio."))


def media_names(spec: MediaSpec, present: Container[str]) -> dict[str, str]:
    """Return the checkpoint's names by canonical name, where `present` has the checkpoint's names.

    Published files and transformers' modules in memory nest the same tensors otherwise.
    """
    prefix = "" if any(name in present for name in spec.tensors()) else "model."
    nested = f"{prefix}embed_vision.patch_dense.weight" in present
    return {name: prefix + (_in_memory(name) if nested else name) for name in spec.tensors()}


def present_parts(spec: MediaSpec, present: Container[str]) -> MediaSpec | None:
    """Return the parts of `spec` of which a checkpoint with the tensors `present` has anything; None: it has none."""
    names = media_names(spec, present)
    found = [name for name, stored in names.items() if stored in present]
    audio = any(name.startswith("embed_audio.") for name in found)
    return spec.of_parts(vision=any(not name.startswith("embed_audio.") for name in found), audio=audio)


def _in_memory(name: str) -> str:
    if name.startswith("vision_embedder."):
        return name.replace("vision_embedder.", "embed_vision.")
    return name.replace("embed_vision.", "embed_vision.multimodal_embedder.")
