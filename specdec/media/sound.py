"""Sound: from a file or an array to frames of 640 samples at 16 kHz, as transformers makes them.

What: `read_sound` decodes, mixes down to one channel and resamples; `cut_frames` cuts samples into the frames of which
each is one soft token (40 ms). How: soundfile decodes WAV, FLAC, OGG and MP3 and soxr resamples, with the settings of
transformers' `load_audio`; what soundfile does not know (AAC, the sound of a video) PyAV decodes. An array is taken as
it is, as 16 kHz. Samples are mixed down and resampled block by block, so that memory holds the 16 kHz
samples of a long recording, and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.media.container import OtherKindError, decodable, is_picture, open_container
from specdec.media.source import MediaError, MediaSource, as_source, media_library, readable

RATE = 16_000
FRAME = 640  # samples of a soft token

_LONGEST = 3 * 3600  # seconds: 270,000 soft tokens, more than a context holds
_BLOCK = 1 << 18  # samples of all channels that are decoded at once

Samples = NDArray[np.float32]


def read_sound(given: Any) -> Samples:
    """Return the samples of the sound `given` at 16 kHz, one channel. Raises ValueError when `given` holds no sound."""
    source = as_source(given, "sound")
    if source is None:
        return _of_array(given)
    return _decode(source)


def has_sound(source: MediaSource) -> bool:
    """Tell whether a video has a sound track."""
    with open_container(source, "video") as container:
        return bool(container.streams.audio)


def cut_frames(samples: Samples) -> Tensor:
    """Return [frames, 640] float32 of samples: silence fills the last frame."""
    count = math.ceil(len(samples) / FRAME)
    frames = torch.zeros(count * FRAME, dtype=torch.float32)
    frames[: len(samples)] = torch.from_numpy(samples)
    return frames.reshape(count, FRAME)


def _of_array(given: Any) -> Samples:
    try:
        values = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    except ValueError as error:
        raise ValueError(f"a sound as an array holds one number for each sample ({error})") from None
    if values.dtype.kind not in "fiu":
        raise ValueError(f"a sound is a path, bytes, a data URI or an array of numbers, not {type(given)}")
    if values.ndim != 1 or not len(values):
        shape = list(values.shape)
        raise ValueError(f"a sound as an array is one channel at {RATE:,} Hz, [samples], not {shape}; mix it down")
    with np.errstate(over="ignore"):
        return _finite(np.ascontiguousarray(values, dtype=np.float32), "a sound as an array")


def _decode(source: MediaSource) -> Samples:
    """Return the samples of a file, mixed down, at 16 kHz."""
    library = media_library("soundfile", "sound")
    with source.open() as stream, readable(source, "sound"):
        try:
            file = library.SoundFile(stream)
        except library.LibsndfileError:  # not one of its formats
            file = None
        if file is not None:
            with file:
                _check_length(source, file.frames / file.samplerate)
                return _joined(source, map(_mixed, _blocks(file)), file.samplerate)
    return _decode_container(source)


def _blocks(file: Any) -> Iterator[NDArray[np.float32]]:
    """Yield the samples [channels, n] of an open sound file, to the last one that is there.

    Its header may speak of more: `SoundFile.blocks` would hand out whatever memory held for the others. And soundfile
    seeks after each block, where a seek in an MP3 loses what the decoder holds; it does not seek in a stream.
    """
    file.seekable = lambda: False
    size = max(1, _BLOCK // file.channels)
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        yield block.T


def _decode_container(source: MediaSource) -> Samples:
    library = media_library("av", "sound")
    if is_picture(source):
        raise OtherKindError(source.name, "sound", "picture")
    with open_container(source, "sound") as container, readable(source, "sound"):
        if not container.streams.audio:
            raise MediaError(f"{source.name}: has no sound track; leave its sound out")
        stream = decodable(source, container.streams.audio[0], "sound")
        frames = container.decode(stream)
        first = next(frames, None)
        planes = library.AudioResampler(format="fltp")  # the same rate and channels, as one kind of number
        decoded = itertools.chain([] if first is None else [first], frames, [None])  # None: what the resampler holds
        parts = (_mixed(part.to_ndarray()) for frame in decoded for part in planes.resample(frame))
        return _joined(source, parts, RATE if first is None else first.sample_rate)


def _mixed(channels: NDArray[np.float32]) -> Samples:
    """Return the mean of [channels, samples]."""
    with np.errstate(over="ignore"):  # `_joined` looks for infinite samples
        mean: Samples = channels[0] if len(channels) == 1 else channels.mean(axis=0)
    return mean


def _joined(source: MediaSource, parts: Iterable[Samples], rate: int) -> Samples:
    """Return the parts of a sound at `rate` in one array at 16 kHz: as many samples as the sound is long.

    Raises ValueError when they hold nothing, or are too long, or are no finite numbers.
    """
    resampler = None
    if rate != RATE:
        resampler = media_library("soxr", "sound").ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
    held, count = bytearray(), 0  # bytes, because they grow in place
    for part in parts:
        count += len(part)
        _check_length(source, count / rate)
        held += (part if resampler is None else resampler.resample_chunk(part)).tobytes()
    if not count:
        raise MediaError(f"{source.name}: holds no samples; fetch or record it again")
    if resampler is not None:
        held += resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True).tobytes()
    size = math.ceil(count * (float(RATE) / rate)) * np.dtype(np.float32).itemsize
    del held[size:]  # soxr may give one more or less
    held += bytes(size - len(held))
    return _finite(np.frombuffer(held, dtype=np.float32), source.name)


def _finite(samples: Samples, name: str) -> Samples:
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: holds samples that are no finite numbers; record or compute it again")
    return samples


def _check_length(source: MediaSource, seconds: float) -> None:
    if seconds > _LONGEST:
        raise MediaError(f"{source.name}: lasts longer than {_LONGEST // 3600} hours; cut it into parts")
