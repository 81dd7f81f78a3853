"""Sound: from a file or an array to frames of 640 samples at 16 kHz, as transformers makes them.

What: `read_sound` decodes, mixes down to one channel and resamples; `cut_frames` cuts samples into the frames of which
each is one soft token (40 ms). How: soundfile decodes WAV, FLAC, OGG and MP3 and soxr resamples, with the settings of
transformers' `load_audio`; what soundfile does not know (AAC, the sound of a video) PyAV decodes. An array is taken as
it is, as 16 kHz. Samples are mixed down block by block, so that memory holds one channel of a long recording.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.media.container import open_container
from specdec.media.source import MediaError, MediaSource, as_source, media_library, readable

RATE = 16_000
FRAME = 640  # samples of a soft token

_LONGEST = 3 * 3600  # seconds: 270,000 soft tokens, more than a context holds
_BLOCK = 1 << 20  # samples of each channel that are decoded at once

Samples = NDArray[np.float32]


def read_sound(given: Any) -> Samples:
    """Return the samples of the sound `given` at 16 kHz, one channel. Raises ValueError when there is none in it."""
    source = as_source(given, "sound")
    if source is None:
        return _of_array(given)
    samples, rate = _decode(source)
    return _resampled(samples, rate)


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
    return _finite(np.ascontiguousarray(values, dtype=np.float32), "a sound as an array")


def _decode(source: MediaSource) -> tuple[Samples, int]:
    """Return the samples of a file, mixed down, and their rate."""
    library = media_library("soundfile", "sound")
    with source.open() as stream, readable(source, "sound"):
        try:
            file = library.SoundFile(stream)
        except library.LibsndfileError:  # not one of its formats
            return _decode_container(source)
        with file:
            _check_length(source, file.frames / file.samplerate)
            # soundfile seeks after each block, and a seek in an MP3 loses what the decoder holds.
            size = file.frames if file.format == "MP3" else _BLOCK
            blocks = file.blocks(max(1, size), dtype="float32", always_2d=True)
            return _joined(source, (_mixed(block.T) for block in blocks), file.samplerate), file.samplerate


def _decode_container(source: MediaSource) -> tuple[Samples, int]:
    library = media_library("av", "sound")
    with open_container(source, "sound") as container:
        if not container.streams.audio:
            raise MediaError(f"{source.name}: has no sound track; leave its sound out")
        stream = container.streams.audio[0]
        planes = library.AudioResampler(format="fltp")  # the same rate and channels, as one kind of number
        decoded = itertools.chain(container.decode(stream), [None])  # None hands out what the resampler still holds
        parts = (_mixed(part.to_ndarray()) for frame in decoded for part in planes.resample(frame))
        return _joined(source, parts, stream.rate), stream.rate


def _mixed(channels: NDArray[np.float32]) -> Samples:
    """Return the mean of [channels, samples]."""
    mean: Samples = channels[0] if len(channels) == 1 else channels.mean(axis=0)
    return mean


def _joined(source: MediaSource, parts: Iterator[Samples], rate: int) -> Samples:
    """Return the parts of a sound in one array. Raises ValueError when they hold nothing, or are too long."""
    held, count = [], 0
    for part in parts:
        held.append(part)
        count += len(part)
        _check_length(source, count / rate)
    if not count:
        raise MediaError(f"{source.name}: holds no samples; record it again")
    return _finite(np.concatenate(held), source.name)


def _finite(samples: Samples, name: str) -> Samples:
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: holds samples that are no finite numbers; record or compute it again")
    return samples


def _check_length(source: MediaSource, seconds: float) -> None:
    if seconds > _LONGEST:
        raise MediaError(f"{source.name}: lasts longer than {_LONGEST // 3600} hours; cut it into parts")


def _resampled(samples: Samples, rate: int) -> Samples:
    if rate == RATE:
        return np.ascontiguousarray(samples)
    resampled = media_library("soxr", "sound").resample(samples, rate, RATE, quality="HQ")
    # As many samples as the sound is long; soxr may give one more or less.
    count = math.ceil(len(samples) * (float(RATE) / rate))
    fitted: Samples = np.zeros(count, dtype=np.float32)
    fitted[: len(resampled)] = resampled[:count]
    return fitted
