"""Prompts with pictures, sound and video of random pixels and samples, for any model that takes them.

What: `media_prompts` for `python -m eval.exactness --media`, and `media_prompt` for what is timed or weighed. Why
random: bytes and time do not depend on what a picture shows, and no picture has to be shipped. The inputs are those of
a processor, so that no file is read. Left out: meaning.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.model.spec import DecoderSpec

FULL = {70: (10, 7), 140: (14, 10), 280: (20, 14), 560: (28, 20), 1120: (40, 28)}
"""The budgets of a picture, and the columns and rows of patches of one that fills each."""
FRAME = (11, 6)  # patches of a frame of 16:9 at its budget of 70
FRAMES_A_SECOND = 25  # of sound


@dataclass(frozen=True)
class Picture:
    """Describe a picture of so many columns and rows of patches; `shows` tells pictures apart."""

    columns: int
    rows: int
    shows: int = 0


@dataclass(frozen=True)
class Sound:
    """Describe a clip of so many frames, 40 ms each."""

    frames: int
    shows: int = 0


@dataclass(frozen=True)
class Video:
    """Describe a video of so many frames, with six tokens of text before each, as many as a time takes."""

    frames: int
    size: tuple[int, int] = FRAME
    shows: int = 0


Part = int | Picture | Sound | Video
"""A part of a prompt: a number of tokens of text, or a medium."""


@dataclass(frozen=True)
class MediaPrompt:
    """Hold a prompt as `generate` takes it: token ids [1, n], and what a processor makes of the media."""

    name: str
    ids: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)


def media_prompts(spec: DecoderSpec) -> list[MediaPrompt]:
    """Return prompts of each kind of media and of mixtures; those with "picture" in front follow one another with the
    same ids and other pictures.

    Raises ValueError when the model takes no pictures, or no sound.
    """
    same: list[Part] = [30, Picture(*FULL[280]), 25]
    described: dict[str, list[Part]] = {
        "picture": same,
        "picture, another": [30, Picture(*FULL[280], shows=1), 25],
        "picture, the first again": same,
        "the largest picture": [5, Picture(*FULL[1120], shows=2), 40],
        "a picture at the end": [9, Picture(*FULL[70], shows=3)],
        "sound": [40, Sound(90)],
        "a video": [10, Video(4), 30],
        "all of them": [
            20,
            Picture(7, 9, 4),
            Picture(9, 7, 5),
            70,
            Sound(60, 6),
            Video(2, (5, 8), 7),
            Sound(30, 8),
            40,
        ],
    }
    return [media_prompt(name, parts, spec) for name, parts in described.items()]


def media_prompt(name: str, parts: Sequence[Part], spec: DecoderSpec, seed: int = 0) -> MediaPrompt:
    """Return a prompt of `parts` for a model of `spec`. Raises ValueError when the model takes no such media."""
    media = spec.media
    if media is None or media.vision is None or media.audio is None:
        raise ValueError(
            "the model takes no pictures and no sound; name one that does, as `python -m eval.synthetic` writes it"
        )
    dice, ids, tokens = random.Random(seed), list[int](), media.tokens
    words = [token for token in range(min(spec.vocab_size, 1 << 12)) if token > 2 and token not in spec.media_ids]
    pixels, frames, clips = list[Tensor](), list[Tensor](), list[Tensor]()
    sizes: dict[str, list[tuple[int, int]]] = {"image": [], "video": []}

    def place(begin: int | None, soft: int | None, end: int | None, count: int) -> None:
        assert soft is not None
        ids.extend([*([] if begin is None else [begin]), *[soft] * count, *([] if end is None else [end])])

    def draw(shows: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + shows)
        return torch.rand(shape, generator=generator, dtype=torch.float32)

    for part in parts:
        if isinstance(part, int):
            ids.extend(dice.choices(words, k=part))
        elif isinstance(part, Picture):
            place(tokens.image_begin, tokens.image, tokens.image_end, part.columns * part.rows)
            pixels.append(draw(part.shows, part.columns * part.rows, media.vision.patch))
            sizes["image"].append((part.columns, part.rows))
        elif isinstance(part, Sound):
            place(tokens.audio_begin, tokens.audio, tokens.audio_end, part.frames)
            clips.append(draw(part.shows, part.frames, media.audio.frame) - 0.5)
        else:
            for number in range(part.frames):
                ids.extend(dice.choices(words, k=6))
                place(tokens.image_begin, tokens.video, tokens.image_end, part.size[0] * part.size[1])
                frames.append(draw(part.shows + 1000 * number, part.size[0] * part.size[1], media.vision.patch))
                sizes["video"].append(part.size)
    inputs: dict[str, Tensor] = {}
    if pixels:
        inputs |= {"pixel_values": _together(pixels), "image_position_ids": _positions(sizes["image"])}
    if frames:
        inputs |= {"pixel_values_videos": _together(frames), "video_position_ids": _positions(sizes["video"])}
        videos = [part.frames for part in parts if isinstance(part, Video)]
        inputs["num_frames_per_video"] = torch.tensor(videos, dtype=torch.int64)
    if clips:
        there = [torch.ones(len(clip), dtype=torch.bool) for clip in clips]
        inputs |= {"input_features": _together(clips), "input_features_mask": _together(there)}
    return MediaPrompt(name, torch.tensor([ids], dtype=torch.int64), inputs)


def batch_of(prompts: Sequence[MediaPrompt], pad: int = 0) -> MediaPrompt:
    """Return several prompts as one batch with padding on the left; the attention mask is among its inputs."""
    longest = max(prompt.ids.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.ids.shape[1] :] = prompt.ids[0]
        mask[row, longest - prompt.ids.shape[1] :] = 1
    names = {name for prompt in prompts for name in prompt.inputs}
    every = {name: [prompt.inputs[name] for prompt in prompts if name in prompt.inputs] for name in names}
    inputs = {name: _joined(name, parts) for name, parts in every.items()}
    return MediaPrompt("batch", ids, {**inputs, "attention_mask": mask})


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Concatenate inputs [media, ...] of several prompts, padded as a processor pads."""
    if name == "num_frames_per_video":
        return torch.cat(tuple(parts))
    return _together([medium for part in parts for medium in part], -1 if name.endswith("position_ids") else 0)


def _together(media: Sequence[Tensor], filler: int = 0) -> Tensor:
    """Stack tensors [n, ...] of several lengths: [media, longest, ...]."""
    longest = max(map(len, media))
    stacked = media[0].new_full((len(media), longest, *media[0].shape[1:]), filler)
    for row, medium in zip(stacked, media, strict=True):
        row[: len(medium)] = medium
    return stacked


def _positions(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Return the positions [pictures, patches, 2] (column, row) of pictures of these columns and rows."""
    grids = []
    for columns, rows in sizes:
        patch = torch.arange(columns * rows, dtype=torch.int64)
        grids.append(torch.stack((patch % columns, patch // columns), dim=1))
    return _together(grids, -1)
