"""Tiny pictures, sounds and videos for `python -m eval.fuzz`, in every format that people have, and how they are read.

They need the extra `media`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from specdec.media.pictures import cut_patches, read_pixels, stack_patches
from specdec.media.sound import cut_frames, read_sound
from specdec.media.video import choose_frames, open_clip

PICTURES = ("png", "jpg", "gif", "webp", "bmp", "tif", "ppm", "ico")
SOUNDS = ("wav", "flac", "ogg", "mp3", "aiff", "au")
VIDEOS = ("mp4", "mkv", "avi", "gif")


def write_media(folder: Path) -> None:
    """Write a folder for each format, `picture-png` and so on, with one file."""
    import soundfile
    from PIL import Image

    frames = list(_frames())
    time = np.arange(4000) / 16_000
    for ending in PICTURES:
        Image.fromarray(frames[0]).save(_file(folder, "picture", ending))
    for ending in SOUNDS:
        soundfile.write(_file(folder, "sound", ending), np.stack([np.sin(900 * time), np.cos(500 * time)], 1), 16_000)
    for ending in VIDEOS:
        _write_video(_file(folder, "video", ending), frames)


def read_picture(folder: Path) -> None:
    """Read a picture as a processor does."""
    stack_patches([cut_patches(read_pixels(_only(folder)), 70)], 70)


def read_sounds(folder: Path) -> None:
    """Read a sound as a processor does."""
    cut_frames(read_sound(_only(folder)))


def read_video(folder: Path) -> None:
    """Read four frames of a video, and its sound where there is any, as a processor does."""
    clip = open_clip(_only(folder))
    taken = choose_frames(clip.total, clip.rate, 4, None)
    stack_patches([cut_patches(frame, 70) for frame in clip.frames(taken)], 70)


def _frames() -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    noise = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for number in range(6):
        yield np.roll(noise, number, axis=1)


def _write_video(path: Path, frames: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]) -> None:
    import av
    from PIL import Image

    if path.suffix == ".gif":
        pictures = [Image.fromarray(frame) for frame in frames]
        pictures[0].save(path, save_all=True, append_images=pictures[1:])
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _file(folder: Path, kind: str, ending: str) -> Path:
    home = folder / f"{kind}-{ending}"
    home.mkdir()
    return home / f"file.{ending}"


def _only(folder: Path) -> Path:
    return next(folder.glob("file.*"))
