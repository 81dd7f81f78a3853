"""Sounds and videos, made and written to files."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np

from tests.support.media.pictures import smooth


def tones(rate: int, channels: int = 1, seconds: float = 0.5) -> np.ndarray:
    """Return [samples, channels], a tone of another pitch in each channel, and one that fades."""
    time = np.arange(int(rate * seconds)) / rate
    waves = [0.3 * np.sin(2 * np.pi * 220 * (c + 1) * time) * (1 - time / seconds / 2) for c in range(channels)]
    return np.stack(waves, axis=-1).astype(np.float32)


def moving(frames: int, height: int = 48, width: int = 80) -> np.ndarray:
    """Return [frames, height, width, 3], a picture that wanders."""
    picture = smooth(height, width)
    return np.stack([np.roll(picture, 3 * number, axis=1) for number in range(frames)])


def write_video(
    path: Path, frames: np.ndarray, rate: int = 24, codec: str = "mpeg4", sound: np.ndarray | None = None
) -> Path:
    """Write frames [frames, height, width, 3], and perhaps samples [samples] at 48 kHz, to a container."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        audio = None if sound is None else container.add_stream("aac", rate=48_000, layout="mono")
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        if audio is not None and sound is not None:
            for begin in range(0, len(sound), 1024):
                part = av.AudioFrame.from_ndarray(sound[None, begin : begin + 1024].copy(), "fltp", "mono")
                part.rate, part.pts = 48_000, begin
                container.mux(audio.encode(part))
            container.mux(audio.encode())
    return path


def turn_clockwise(path: Path) -> Path:
    """Rewrite an MP4 so that players turn its pictures a quarter clockwise, as a telephone held upright writes it."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path
