"""Where the results of a command go, and how a command ends: files, stdout, exit codes, errors in one line.

One rule for the files that a user names (`--json`, `--prometheus`, `report --out`): a file is written when it is not
there, or is empty, or was written by the same option before; a file with other contents is refused before the work
begins. A link is followed, a device or a pipe is written to. `-` is stdout, where no other text then goes.

Neither torch nor transformers is imported here, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from specdec.util import atomic
from specdec.util.text import printable

DIFFERS, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes; 130 is what a shell reports after Ctrl-C
STDOUT = Path("-")
# One of these is in every folder that training wrote.
_TRAINED = ("training/set", "training/progress.json", "training/state.pt", "mtp.gguf", "specdec.json")
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")
_NO_THREADS = ("can't start new thread", "thread creation failed", "resource temporarily unavailable")

_results: TextIO | None = None  # stdout, while the text for people goes to stderr


def file_name(text: str) -> Path:
    """Parse a path, in which `~` is the home folder: an argparse type."""
    try:
        return atomic.user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_record(path: Path) -> bool:
    """Tell whether `path` holds a record that `--json` wrote: an object that names its command."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("command"), str)


def is_metrics(path: Path) -> bool:
    """Tell whether `path` holds counters that `--prometheus` wrote."""
    with path.open("rb") as file:
        return file.read(100).startswith(b"# HELP specdec:")


def check_writable(
    path: Path | None, option: str = "--json", ours: Callable[[Path], bool] = is_record, writer: str | None = None
) -> None:
    """Raise a ValueError before the work, not after it, when `path`, which `option` named, cannot be written or
    replaced.

    A file with contents for which `ours` is false is not replaced: `writer` (by default the option) did not write it.
    """
    if path is None or path == STDOUT:
        return
    try:
        if not atomic.is_file_like(path):
            return
        if path.is_dir():
            raise ValueError(f"{option} {path}: is a folder; name a file")
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise ValueError(f"{option} {path}: the folder {folder} does not exist; create it first")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{option} {path}: the folder {folder} cannot be written")
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"{option} {path}: cannot be written")
        if atomic.is_foreign(path, ours):
            raise ValueError(
                f"{option} {path}: holds something that {writer or option} did not write; name another file, or delete "
                "this one"
            )
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from error


def check_head_folder(folder: Path, option: str = "--out") -> None:
    """Raise a ValueError before the work when `folder` has contents that training did not write, or is a file."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{option} {folder}: is a file; name a folder")
        if not folder.exists() or any((folder / name).exists() for name in _TRAINED) or not any(folder.iterdir()):
            return
    except OSError as error:
        raise ValueError(f"{option} {folder}: {error.strerror}") from error
    raise ValueError(f"{option} {folder}: holds something that train did not write; name another folder")


def put_text(path: Path, text: str) -> None:
    """Write `text` to `path`, all or nothing: a reader of the file never sees half of it. Raises OSError."""
    if path == STDOUT:
        stream = _results or sys.stdout
        stream.write(text)
        stream.flush()
    else:
        atomic.write_text(path, text)


def put_record(path: Path | None, record: dict[str, Any]) -> None:
    """Write `record` as one line of JSON to `path`; do nothing where `path` is None. Raises OSError."""
    if path is not None:
        put_text(path, json.dumps(record, allow_nan=False) + "\n")  # ASCII, so that any stream takes it


def run_guarded(command: Callable[[], int], *outputs: Path | None) -> int:
    """Run `command` and return its exit code; end without a traceback for errors that a user can mend, and for Ctrl-C.

    `outputs`: the files that the command was told to write. Where one is `-`, the text for people goes to stderr
    meanwhile.
    """
    _take_any_text()
    if outputs.count(STDOUT) > 1:
        print("error: two results go to stdout (-); name a file for one of them", file=sys.stderr)
        return USER_ERROR
    try:
        with _warnings_in_a_line(), _results_alone() if STDOUT in outputs else contextlib.nullcontext():
            code = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk is still an error in one line
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        _drop_stdout()
        return DIFFERS
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = sentence(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _drop_stdout()
        return USER_ERROR


def sentence(error: Exception) -> str | None:
    """Return the message of `error` in one line without control characters; None for an error that no user can mend."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    low = text.casefold()
    if isinstance(error, MemoryError) or any(words in low for words in _NO_MEMORY):
        text = (
            "there is not enough memory for this; take a smaller model, --quantize int4 or a shorter context "
            f"({text.splitlines()[0] if text else 'an allocation failed'})"
        )
    elif any(words in low for words in _NO_THREADS):
        text = f"the system gives this process no more threads; ask for fewer with --threads ({text})"
    elif isinstance(error, RuntimeError):
        return None
    return _in_a_line(text)


def _in_a_line(text: str) -> str:
    return " ".join(filter(None, (line.strip() for line in printable(text).splitlines())))


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Show Python's warnings on stderr as their text alone, without the place in the source that they come from."""

    def show(message: Warning | str, *place: Any) -> None:
        print(f"warning: {_in_a_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]  # the place in one argument
        yield


@contextlib.contextmanager
def _results_alone() -> Iterator[None]:
    global _results
    _results = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = None


def _take_any_text() -> None:
    """Let no stream fail for a character: a terminal that knows only ASCII shows "?", a pipe gets an escape. Bytes on
    stdin that are no text fail only where they are taken as text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream.isatty() else "backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        ascii_only = sys.stdin.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646")
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="surrogateescape")


def _drop_stdout() -> None:
    """Point stdout at nothing: the interpreter flushes stdout once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
