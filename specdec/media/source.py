"""Media as users hold them: a path, bytes, an open file, a data URI, base64.

What: `as_source` tells these from arrays and Pillow's images; a `MediaSource` opens as a file and has a name for
messages. `readable` stands around reading: whatever a library raises for a damaged file becomes a ValueError that names
the file and the way out. `media_library` imports a library of the extra `media`. Left out: addresses of the web,
because a prompt must not make this machine fetch anything.
"""

from __future__ import annotations

import base64
import importlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes

from specdec.util.atomic import user_path
from specdec.util.text import printable
from specdec.weights.metadata import foreign, quote

_PACKAGES = {"PIL": "Pillow", "av": "PyAV", "soundfile": "soundfile", "soxr": "soxr"}
_WEB = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_FILE = "file://"
_LEAST_BASE64 = 64  # characters: no picture, sound or video is shorter, and most paths are
ADVICE = {
    "picture": "save it again as PNG or JPEG",
    "sound": "convert it to WAV, FLAC, OGG or MP3",
    "video": "convert it to MP4",
}


@dataclass(frozen=True)
class MediaSource:
    """Hold a medium in a file or in memory, and its name in messages."""

    name: str
    content: Path | bytes

    def open(self) -> BinaryIO:
        """Open the medium for reading. Raises ValueError when the file cannot be opened, is empty, or is no file."""
        if isinstance(self.content, Path) and self.content.exists() and not self.content.is_file():
            # A pipe would be waited for, and a device has no end.
            kind = "a folder" if self.content.is_dir() else "a pipe or a device"
            raise ValueError(f"{self.name}: is {kind}; save the medium to a file, and pass its path or its bytes")
        with foreign(self.name, "check the path and who may read it"):
            stream = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")
        if not stream.read(1):
            stream.close()
            raise ValueError(f"{self.name}: is empty; save or fetch it again")
        stream.seek(0)
        return stream


def as_source(given: Any, kind: str) -> MediaSource | None:
    """Return the source that `given` is, a "picture", "sound" or "video"; None for arrays and anything else.

    Raises ValueError for an address of the web, and for a text that is neither a file's path, nor a data URI, nor
    base64.
    """
    if isinstance(given, MediaSource):
        return given
    if isinstance(given, (bytes, bytearray, memoryview)):
        return _of_bytes(bytes(given), kind)
    if hasattr(given, "read") and hasattr(given, "seek") and not isinstance(given, os.PathLike):
        with foreign(f"a {kind} in an open file", 'open it for reading with "rb", or pass its path'):
            given.seek(0)
            return _of_bytes(bytes(given.read()), kind)
    if not isinstance(given, (str, os.PathLike)):
        return None
    text = os.fspath(given)
    if not text:
        raise ValueError(f"a {kind} has an empty path; pass the path of a file")
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        encoded = head.endswith(";base64")
        return _of_bytes(_decoded(unquote(body), kind) if encoded else unquote_to_bytes(body), kind)
    if len(text) >= _LEAST_BASE64 and not _is_file(text) and _seems_base64(text):
        return _of_bytes(_decoded(text, kind), kind)
    path = file_path(text)
    if not path.exists():
        name = printable(str(path))
        raise ValueError(f"{name}: there is no such file; a {kind} is a path, bytes, a data URI or an array")
    return MediaSource(str(path), path)


def file_path(text: str) -> Path:
    """Return the path that a user's `text` means: one as shells take it, or a file: address, as desktops hand it over.

    Raises ValueError for a text that no file can be called, and for an address of the web.
    """
    if _WEB.match(text) and not text.startswith(_FILE):
        raise ValueError(f"{quote(text)}: nothing is fetched from the web; download it, and pass its path or its bytes")
    if not text.startswith(_FILE):
        return user_path(text)
    return user_path(unquote(text.removeprefix(_FILE).removeprefix("localhost")))


def _of_bytes(content: bytes, kind: str) -> MediaSource:
    return MediaSource(f"a {kind} of {len(content):,} bytes", content)


def _is_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except ValueError:
        return False


def _seems_base64(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text) is not None


def _decoded(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise ValueError(f"a {kind} in base64 is damaged: {quote(text)}; encode it again, or pass its bytes") from None


class MediaError(ValueError):
    """Report that a medium cannot be used; the message names it and says what to do, and `readable` leaves it as it
    is."""


@contextmanager
def readable(source: MediaSource, kind: str) -> Iterator[None]:
    """Turn any error of a library in the block into a ValueError that names `source` and says what to do."""
    told = None
    with foreign(source.name, ADVICE[kind], f"cannot be read as a {kind}"):
        try:
            yield
        except MediaError as error:
            told = error
    if told is not None:
        raise told


def media_library(name: str, kind: str) -> Any:
    """Import the library `name` for media of `kind`. Raises ImportError, with the command that installs it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # soundfile raises OSError without libsndfile
        package = _PACKAGES[name.partition(".")[0]]
        raise ImportError(
            f"a {kind} needs {package} ({error}): pip install -c constraints.txt -e '.[media]'"
        ) from error
