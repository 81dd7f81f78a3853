"""Video: from a file or frames to the frames that a model reads, and their times.

What: `open_clip` returns a `Clip` of whatever a video is given as; `choose_frames` picks frames by number or by rate,
as transformers does; `timestamps` writes the time of each. How: PyAV decodes, frame by frame, and only the picked
frames are kept. A clip with fewer frames than asked for gives all of its frames, where transformers refuses the
clip. Frames that the file says are to be turned, as telephones record them, are turned upright.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.media.container import OtherKindError, decodable, is_picture, moving_pictures, open_container
from specdec.media.pictures import as_pixels, channels_first, on_white, read_pixels
from specdec.media.source import ADVICE, MediaError, MediaSource, as_source, readable

FRAMES = 32  # of a clip, when neither a number nor a rate is asked for
MOST_FRAMES = 4096  # that are taken of a clip: 300,000 tokens, more than a context holds
_MOST_PIXELS = 1 << 26  # of a frame, twice those of 8K; each thread of the decoder holds some frames
ASSUMED_RATE = 24.0  # frames a second of frames that come without a rate


@dataclass(frozen=True)
class Clip:
    """Hold a video: how many frames, how many a second, and either a file or the frames."""

    total: int
    rate: float | None
    height: int
    width: int
    source: MediaSource | None = None
    held: Tensor | None = None  # [total, 3, height, width]

    def frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield the frames at `indices`, which rise, as [3, height, width]. Raises ValueError when one is missing."""
        if self.held is not None:
            yield from self.held[list(indices)]
        elif self.source is not None:
            yield from _decode(self.source, indices)


def open_clip(given: Any) -> Clip:
    """Return the video `given`: a source, an array of frames, or a list of pictures of one size.

    Raises ValueError when `given` holds no video.
    """
    if isinstance(given, Clip):
        return given
    source = as_source(given, "video")
    if source is not None:
        return _open(source)
    if isinstance(given, (np.ndarray, Tensor)) and given.ndim == 4:
        return _of_array(given)
    if isinstance(given, (list, tuple)) and given:
        pictures = [read_pixels(picture) for picture in given]
        if len({(picture.shape, picture.dtype) for picture in pictures}) > 1:
            raise ValueError("the frames of a video differ in size; pass frames of one size, or pictures")
        return _of_frames(torch.stack(pictures))
    raise ValueError(f"a video is a path, bytes, a data URI, an array of frames or a list of them, not {type(given)}")


def choose_frames(total: int, rate: float | None, number: int | None, per_second: float | None) -> list[int]:
    """Return the indices of frames spread evenly over `total`: `number` of them, or `per_second` for each second.

    All frames, where neither is given. Never more than there are, and at least one. Raises ValueError when a rate is
    asked for and the video's own is unknown, and when more frames are asked for than a context holds.
    """
    if per_second is not None:
        if rate is None:
            raise ValueError("fps= needs the video's own rate; pass video_metadata with fps, or num_frames=")
        number = max(1, int(min(total / rate * per_second, total)))
    number = total if number is None else min(number, total)
    if number > MOST_FRAMES:
        raise ValueError(f"no context holds {number:,} frames of a video; ask for {MOST_FRAMES:,} or fewer")
    return [i * total // number for i in range(number)]


def timestamps(indices: Sequence[int], rate: float | None) -> list[str]:
    """Return the time of each frame as minutes and seconds, "61:05" after an hour and a minute."""
    seconds = [index / (rate or ASSUMED_RATE) for index in indices]
    return [f"{int(second // 60):02d}:{int(second % 60):02d}" for second in seconds]


def _of_array(array: np.ndarray[Any, Any] | Tensor) -> Clip:
    frames = channels_first(as_pixels(array, "video"))
    if frames.shape[1] == 1:
        frames = frames.repeat(1, 3, 1, 1)
    return _of_frames(on_white(frames) if frames.shape[1] == 4 else frames)


def _of_frames(frames: Tensor) -> Clip:
    if not frames.numel():
        raise ValueError(f"a video of shape {list(frames.shape)} shows nothing; pass at least one frame")
    return Clip(len(frames), None, frames.shape[-2], frames.shape[-1], held=frames)


def _open(source: MediaSource) -> Clip:
    with open_container(source, "video") as container, readable(source, "video"):
        pictures = moving_pictures(container)
        if not pictures and container.streams.audio:
            raise OtherKindError(source.name, "video", "sound")
        if not pictures:
            raise MediaError(f"{source.name}: has neither pictures nor sound; {ADVICE['video']}")
        stream = decodable(source, pictures[0], "video")
        # Some containers do not say how many frames they hold.
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        if total == 1 and is_picture(source):
            raise OtherKindError(source.name, "video", "picture")
        if stream.width * stream.height > _MOST_PIXELS:
            raise MediaError(f"{source.name}: has frames of {stream.width} x {stream.height} pixels; make them smaller")
        if not total:
            raise MediaError(f"{source.name}: holds no frames; record or convert it again")
        rate = stream.average_rate or stream.guessed_rate
        return Clip(total, float(rate) if rate else None, stream.height, stream.width, source)


def _decode(source: MediaSource, indices: Sequence[int]) -> Iterator[Tensor]:
    wanted = iter(indices)
    due = next(wanted, None)
    with open_container(source, "video") as container, readable(source, "video"):
        stream = moving_pictures(container)[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}  # frames may be larger than the header says
        for number, frame in enumerate(container.decode(stream)):
            while due is not None and number == due:
                rows = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # [height, width, 3]
                yield torch.from_numpy(np.ascontiguousarray(rows.transpose(2, 0, 1)))
                due = next(wanted, None)
            if due is None:
                return
        raise MediaError(f"{source.name}: ends before frame {due:,}, which it should hold; fetch or convert it again")
