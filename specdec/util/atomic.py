"""Write files whole or not at all, whatever stops the writing; write through a path that is no file.

What: `replacing` for all that this package writes. A link stays, and the file that it points to is replaced, with its
mode. A device, a pipe, `/dev/stdout` and the like are written to; they are never replaced. `is_foreign` is the one rule
for a user's files: a file that somebody else wrote is not replaced.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_DESCRIPTORS = ("/proc/self/fd", "/dev/fd")
_LONGEST_NAME = 255  # bytes
_LINKS = 40  # as many as Linux follows
_NAME = 150  # bytes of a name that a temporary one repeats: file systems take 255
_numbers = itertools.count()


def user_path(name: str | os.PathLike[str]) -> Path:
    """Return the path that a user's `name` means: `~` and `~user` stand for home folders.

    Raises ValueError when there is no such home folder, or when no file can be called so.
    """
    text = os.fspath(name)
    if "\0" in text:
        raise ValueError(f"{text!r}: holds a NUL character, and no file can be called so")
    try:
        parts = list(map(os.fsencode, text.split(os.sep)))
    except UnicodeEncodeError:
        raise ValueError(f"{text!a}: holds half of a surrogate pair, and no file can be called so") from None
    if max(map(len, parts)) > _LONGEST_NAME:
        raise ValueError(f"{text[:40]}...: a name of {len(text):,} characters; no file can be called so")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{os.fspath(name)}: no home folder is known for {Path(name).parts[0]}; write the path out"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path, whose file takes the place of `path` after the block; after an error nothing is left.

    The folder of `path` is made where there is none. Where `path` is something else than a file, the written content is
    copied to it in the end. Raises OSError, which names `path` and not the temporary file.
    """
    through = _opener(path)
    with tempfile.TemporaryDirectory() if through else contextlib.nullcontext() as folder:
        target = Path(os.path.realpath(path)) if folder is None else Path(folder) / "written"
        name = os.fsdecode(os.fsencode(target.name)[:_NAME])
        temporary = target.with_name(f".{name}.{os.getpid()}-{next(_numbers)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            mode = _mode(target)
            yield temporary
            if through is not None:
                with temporary.open("rb") as source, through() as stream:
                    shutil.copyfileobj(source, stream)
                return
            if mode is not None:
                temporary.chmod(mode)
            os.replace(temporary, target)
        except OSError as error:
            raise _about(path, error, temporary, target) from None
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as `replacing` does; halves of surrogate pairs become \\udc80 and so on.

    Raises OSError.
    """
    data = text.encode("utf-8", "backslashreplace")
    through = _opener(path)
    if through is None:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    else:
        try:
            with through() as stream:
                stream.write(data)
        except OSError as error:
            raise _about(path, error) from None


def is_foreign(path: Path, ours: Callable[[Path], bool]) -> bool:
    """Return whether `path` is a file with content for which `ours` is false: such a file is not replaced.

    Raises OSError when the file cannot be read.
    """
    try:
        state = path.stat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(state.st_mode) and state.st_size > 0 and _opener(path) is None and not ours(path)


def is_file_like(path: Path) -> bool:
    """Return whether writing to `path` makes or replaces a file, instead of going to a device, pipe or descriptor."""
    return _opener(path) is None


def _about(path: Path, error: OSError, *others: Path) -> OSError:
    """Return the same error, of `path`, where it names no file or one of `others`."""
    if error.errno is not None and (error.filename is None or error.filename in map(str, others)):
        return OSError(error.errno, error.strerror, str(path))
    return error


def _mode(target: Path) -> int | None:
    """Return the permissions of a file that is there. Raises PermissionError for a file that may not be written."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return stat.S_IMODE(mode)


def _opener(path: Path) -> Callable[[], BinaryIO] | None:
    """Return the means to open a path that is not a regular file; None for files, and for a path that is not there."""
    number = _descriptor(path)
    if number is not None:
        return lambda: _duplicate(number)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else lambda: path.open("wb")


def _duplicate(number: int) -> BinaryIO:
    """Return a file of this process, opened before, to go on writing where it is: opened anew it would begin at its
    start."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    return os.fdopen(os.dup(number), "wb")


def _descriptor(path: Path) -> int | None:
    """Return the number where `path` names an open file of this process: /dev/stdout, /proc/self/fd/1, a link to
    one."""
    places = {os.path.realpath(place) for place in _DESCRIPTORS}
    name = os.path.abspath(path)
    for _ in range(_LINKS):
        folder, last = os.path.split(name)
        folder = os.path.realpath(folder)
        if folder in places and last.isdecimal():
            return int(last)
        try:
            name = os.path.join(folder, os.readlink(name))
        except (OSError, ValueError):
            return None
    return None
