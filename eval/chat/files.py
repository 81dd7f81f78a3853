"""Files that a person names: options and paths that are checked before a model loads, and paths in what was typed.

What: `check_media` refuses what `run.py generate` cannot use. `dragged` finds paths at the beginning of what was typed,
where terminals write a file that is dropped on them. The module imports nothing heavy.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from specdec.media.source import file_path
from specdec.util.atomic import user_path

KINDS = {"image": "picture", "audio": "sound", "video": "video"}
_SUFFIXES = {
    "image": ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .ppm",
    "audio": ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .aiff .aif .au",
    "video": ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ogv .3gp .wmv",
}
_KIND_OF = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_QUOTED = re.compile(r"""(["'])(.+?)\1(?=\s|$)""")
# As a shell writes a word: pieces in quotation marks, escaped characters, and all others.
_PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)""", re.DOTALL)
_SHELL = re.compile(rf"(?:{_PIECE.pattern}|[^\s\\'\"])+(?=\s|$)", re.DOTALL)


def check_media(asked: argparse.Namespace) -> None:
    """Raise a ValueError for options of `run.py generate` that do not fit each other, and for a file that is none."""
    files = [(kind, path) for kind in KINDS for path in getattr(asked, kind)]
    if asked.raw and files:
        raise ValueError("--raw continues text alone; leave it out, or the pictures, sound and video")
    for option, given, kind in (
        ("--image-tokens", asked.image_tokens is not None, "image"),
        ("--frames", asked.frames is not None, "video"),
        ("--no-sound", asked.no_sound, "video"),
    ):
        if given and not getattr(asked, kind):
            what = KINDS[kind]
            raise ValueError(f"{option} is about a {what}, and there is none; add --{kind} FILE, or leave {option} out")
    for kind, path in files:
        try:
            check_file(path)
        except ValueError as error:
            raise ValueError(f"--{kind} {error}") from None


def check_file(path: Path) -> None:
    """Raise a ValueError, which names `path` and says what to do, when no medium can be read from there."""
    try:
        if path.is_file() and path.stat().st_size:
            if os.access(path, os.R_OK):
                return
            wrong = "cannot be read; change who may read it"
        elif path.is_file():
            wrong = "is empty; save or fetch it again"
        elif path.is_dir():
            wrong = "is a folder; name a file in it"
        elif path.exists():
            wrong = "is a pipe or a device; save what comes from it to a file, and name that"
        else:
            wrong = "there is no such file; check the path"
    except OSError as error:
        wrong = f"cannot be read ({error.strerror}); check the path"
    raise ValueError(f"{path}: {wrong}")


def files_in(text: str) -> list[Path]:
    """Return the paths in a text of nothing but paths, each bare, in quotation marks, or with escaped spaces.

    Raises ValueError for a word that no file can be called.
    """
    whole = user_path(text)
    return [whole] if whole.is_file() else [file_path(word) for word, _ in _words(text)]


def dragged(text: str) -> tuple[list[tuple[str, Path]], str]:
    """Return the media files that a message begins with, each with its kind, and the rest of the message."""
    if kind := _kind(text):  # a name with spaces, as it is
        return [(kind, file_path(text))], ""
    found: list[tuple[str, Path]] = []
    for word, rest in _words(text):
        kind = _kind(word)
        if kind is None:
            break
        found.append((kind, file_path(word)))
        text = rest
    return found, text


def _words(text: str) -> Iterator[tuple[str, str]]:
    """Yield each word of `text` as a terminal writes a path, without its quotation marks, and the text behind it."""
    while text := text.strip():
        if os.name == "posix" and (found := _SHELL.match(text)):
            word = _PIECE.sub(_unquoted, found[0])
        elif found := _QUOTED.match(text):
            word = found[2]
        else:
            word = text.split(maxsplit=1)[0]
        text = text[found.end() if found else len(word) :]
        yield word, text.strip()


def _unquoted(piece: re.Match[str]) -> str:
    """Return what a piece of a shell's word says: in quotation marks, in double ones, or behind a backslash."""
    single, double, escaped = piece.groups()
    return single or escaped or re.sub(r'\\(["\\$`])', r"\1", double or "")


def _kind(word: str) -> str | None:
    """Return the kind of the media file at the path `word`; None where there is no such file."""
    kind = _KIND_OF.get(os.path.splitext(word)[1].lower())
    try:
        return kind if kind and file_path(word).is_file() else None
    except (OSError, ValueError):
        return None
