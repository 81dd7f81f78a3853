"""Media read with the settings of a call, as a processor stacks them.

What: `read_picture` and `read_video` decode a medium, pick frames and cut them into patches. A medium that was read
before, with the same settings, is taken as it is: a conversation about a long video decodes the video once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.video_utils import VideoMetadata

from specdec.media.pictures import PicturePatches, cut_patches, read_pixels
from specdec.media.settings import MediaSettings
from specdec.media.video import ASSUMED_RATE, Clip, choose_frames, open_clip, timestamps
from specdec.weights.metadata import naming


@dataclass(frozen=True)
class ReadVideo:
    """Hold the picked frames of a video, and the metadata that say at what times the frames are."""

    frames: list[PicturePatches]
    metadata: VideoMetadata

    @property
    def times(self) -> list[str]:
        """Return the time of each frame as a prompt writes it."""
        return timestamps(self.metadata.frames_indices, self.metadata.fps)


def read_picture(given: Any, settings: MediaSettings) -> PicturePatches:
    """Return the picture `given`, cut for the call's budget. Raises ValueError when it cannot be read."""
    patches = given if isinstance(given, PicturePatches) else cut_patches(read_pixels(given), settings.image_tokens)
    return _of_budget(patches, settings.image_tokens)


def read_video(given: Any, metadata: VideoMetadata | None, settings: MediaSettings) -> ReadVideo:
    """Return the frames of the video `given` that the settings pick. Raises ValueError when it cannot be read, or when
    `metadata` speak of other frames."""
    if isinstance(given, ReadVideo):
        for frame in given.frames:
            _of_budget(frame, settings.frame_tokens)
        return given
    clip = open_clip(given)
    metadata = metadata or _metadata_of(clip)
    asked = (metadata.total_num_frames, metadata.fps, settings.num_frames, settings.fps)
    with naming("a video" if clip.source is None else clip.source.name):
        taken = choose_frames(*(asked if settings.sample else (clip.total, None, None, None)))
    if settings.sample or metadata.frames_indices is None:
        metadata.frames_indices = taken
    if len(metadata.frames_indices) != len(taken) or taken[-1] >= clip.total:
        raise ValueError(
            f"video_metadata speaks of {len(metadata.frames_indices)} frames of {metadata.total_num_frames}, "
            f"and the video has {clip.total}; correct it, or leave it out"
        )
    metadata.fps = metadata.fps or ASSUMED_RATE
    return ReadVideo([cut_patches(frame, settings.frame_tokens) for frame in clip.frames(taken)], metadata)


def _metadata_of(clip: Clip) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=clip.total,
        fps=clip.rate,
        width=clip.width,
        height=clip.height,
        duration=clip.total / clip.rate if clip.rate else None,
        video_backend="pyav" if clip.source else None,
    )


def _of_budget(patches: PicturePatches, budget: int) -> PicturePatches:
    if patches.budget != budget:
        raise ValueError(
            f"a medium was prepared for {patches.budget} soft tokens, and the call asks for {budget}; pass the same "
            "max_soft_tokens to both"
        )
    return patches
