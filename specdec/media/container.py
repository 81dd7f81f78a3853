"""Containers of video and sound, opened by PyAV.

A file is handed over as an open stream, and no protocol is allowed: FFmpeg would follow addresses and paths inside a
playlist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from specdec.media.source import ADVICE, MediaError, MediaSource, media_library, readable


@contextmanager
def open_container(source: MediaSource, kind: str) -> Iterator[Any]:
    """Open the container `source`, for as long as the block runs. Raises ValueError when FFmpeg cannot read it."""
    library = media_library("av", kind)
    with source.open() as stream:
        with readable(source, kind):
            container = library.open(stream, options={"protocol_whitelist": ""})
        with container:
            yield container


def decodable(source: MediaSource, stream: Any, kind: str) -> Any:
    """Return a stream of a container. Raises ValueError where FFmpeg has no decoder for it."""
    if stream.codec_context is None:
        raise MediaError(f"{source.name}: has a {kind} track of an unknown codec; {ADVICE[kind]}")
    return stream
