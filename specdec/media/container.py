"""Containers of video and sound, opened by PyAV, and what a medium holds, whatever it was given as.

A file is handed over as an open stream, and no protocol is allowed: FFmpeg would follow addresses and paths inside a
playlist. `OtherKindError` says that a picture was given as a sound, and the like, so that a caller can name the right
argument, option or command: a library says that the data are invalid.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from specdec.media.source import ADVICE, MediaError, MediaSource, media_library, readable

_TEXTS = {"tty", "bin", "xbin", "adf", "idf"}  # FFmpeg draws the letters of any text file


class OtherKindError(MediaError):
    """Report that a medium was given as a `given` and is a `kind`: each "picture", "sound" or "video"."""

    def __init__(self, name: str, given: str, kind: str) -> None:
        super().__init__(f"{name}: is a {kind}, and was given as a {given}; pass it as a {kind}")
        self.name, self.given, self.kind = name, given, kind


@contextmanager
def open_container(source: MediaSource, kind: str) -> Iterator[Any]:
    """Open the container `source`, for as long as the block runs. Raises ValueError when FFmpeg cannot read it."""
    library = media_library("av", kind)
    with source.open() as stream:
        with readable(source, kind):
            container = library.open(stream, options={"protocol_whitelist": ""})
        with container:
            if container.format.name in _TEXTS:
                raise ValueError(f"{source.name}: is a text, and no {kind}; name another file")
            yield container


def decodable(source: MediaSource, stream: Any, kind: str) -> Any:
    """Return a stream of a container. Raises ValueError where FFmpeg has no decoder for it."""
    if stream.codec_context is None:
        raise MediaError(f"{source.name}: has a {kind} track of an unknown codec; {ADVICE[kind]}")
    return stream


def is_picture(source: MediaSource) -> bool:
    """Tell whether Pillow knows the format of a medium."""
    images = media_library("PIL.Image", "picture")
    try:
        with warnings.catch_warnings(), source.open() as stream:
            warnings.simplefilter("ignore")  # many pixels
            images.open(stream).close()
            return True
    except images.DecompressionBombError:
        return True
    except Exception:  # each format has kinds of its own
        return False


def moving_pictures(container: Any) -> Sequence[Any]:
    """Return the video tracks of an open container; the cover of an album is none."""
    cover = media_library("av.stream", "video").Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def plays(source: MediaSource) -> str | None:
    """Return "video" or "sound" for a medium with such a track; None where FFmpeg finds neither."""
    with suppress(ValueError), open_container(source, "video") as container:
        if container.format.name == "image2" or container.format.name.endswith("_pipe"):
            return None  # of pictures; FFmpeg goes by the file's name alone
        return "video" if moving_pictures(container) else "sound" if container.streams.audio else None
    return None
