"""Texts of a model's use, kept on the user's disk for training: token ids alone, a small JSON file for each text.

What: `UseLog`, which one model's texts are added to and read from; `use_logs`, all logs of a folder. Why token ids and
no states: the backbone reads them again, to the bit (`drafter.data.given`), in a fraction of the time that it took to
write them; states would be a thousand times as many bytes, of one shape of head. Why a file for each text: it is there
as a whole or not at all, whoever is killed, two processes never write the same one, and the oldest is easily dropped.

A conversation is one text, its longest: a text takes the place of those that it goes on from (`goes_on`). The files are
the owner's alone (mode 600), `TIME-ID.json`: a text that takes another one's place keeps the ID, by which texts are
held out of training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from specdec.util.atomic import replacing
from specdec.weights.hub.paths import cache_folder
from specdec.weights.metadata import LARGEST, Values, naming, read_object

ABOUT = "about.json"
RECENT = 256  # texts in memory, which a new one may go on from
LONGEST = 1 << 20  # tokens of a text that is kept
_RECOUNT = 32  # texts after which the bytes of all processes are counted anew
_ROOM = 0.9  # of the limit, that is left when old texts are dropped
_NAME = re.compile(r"(\d{20})-([0-9a-f]{12})\.json")


class UseText(NamedTuple):
    """Keep a text of a model's use: all its token ids, where its last answer begins, its id, and when (seconds since
    1970) it was kept."""

    tokens: array[int]
    answer: int
    id: str
    when: float

    @property
    def prompt(self) -> array[int]:
        """Return the token ids before the last answer."""
        return self.tokens[: self.answer]


class UsedModel(NamedTuple):
    """Name the model of a log: by what it was loaded as, its fingerprint, and its adapter ("", "": none)."""

    name: str
    fingerprint: str
    adapter: str = ""
    adapter_identity: str = ""

    @property
    def key(self) -> str:
        """Return the name of the log's folder: another name of the same model has the same."""
        return hashlib.sha256(f"{self.fingerprint} {self.adapter_identity}".encode()).hexdigest()[:16]


def goes_on(longer: UseText, shorter: UseText) -> bool:
    """Tell whether `longer` has all of `shorter`, or is a later turn of the same conversation: its prompt begins with
    the shorter one's. The answer between may be written otherwise, as chat templates do."""
    if len(longer.tokens) >= len(shorter.tokens) and longer.tokens[: len(shorter.tokens)] == shorter.tokens:
        return True
    return longer.answer > shorter.answer and longer.tokens[: shorter.answer] == shorter.prompt


def use_folder() -> Path:
    """Return the folder of all logs; it need not exist. Raises FileNotFoundError: see `cache_folder`."""
    return cache_folder() / "use"


@dataclass(frozen=True)
class Stored:
    """Count what a log holds: files, their bytes, and the first and last time (seconds since 1970; 0 where empty)."""

    texts: int
    nbytes: int
    oldest: float
    newest: float


class UseLog:
    """Hold the texts of one model in `folder / key`, where all logs of `folder` take at most `limit` bytes."""

    def __init__(self, folder: Path, model: UsedModel, limit: int = 0) -> None:
        """Open the log; nothing is written before the first text."""
        self.folder, self.model, self.limit = folder, model, limit
        self.place = folder / model.key
        self._recent: dict[Path, UseText] | None = None
        self._bytes, self._since = 0, _RECOUNT

    def add(self, tokens: Sequence[int], answer: int) -> bool:
        """Keep a text whose last answer begins at token `answer`, and drop those that it goes on from, and old ones
        where there is no room; return False where a text that is kept has all of it, or it has no answer.

        Raises OSError: it cannot be written; what was kept before still is.
        """
        text = UseText(array("i", tokens), answer, secrets.token_hex(6), time.time())
        if not 0 < answer < len(text.tokens) <= LONGEST:
            return False
        recent = self._newest() if self._recent is None else self._recent
        self._recent = recent
        if any(goes_on(old, text) and path.exists() for path, old in recent.items()):
            return False
        before = {path: old for path, old in recent.items() if goes_on(text, old)}
        for old in before.values():
            text = text._replace(id=old.id)
        path = self.place / f"{time.time_ns():020d}-{text.id}.json"
        self._since += 1
        self._bytes += self._write(path, text)
        for gone in before:
            gone.unlink(missing_ok=True)  # another process, or `erase`, may have been first
            del recent[gone]
        recent[path] = text
        while len(recent) > RECENT:
            del recent[next(iter(recent))]
        if self._bytes > self.limit or self._since >= _RECOUNT:
            self._bytes, self._since = drop_oldest(self.folder, self.limit), 0
        return True

    def texts(self) -> tuple[list[UseText], list[str]]:
        """Return the texts, the oldest first, each conversation once; and what is wrong with files that cannot be
        read."""
        found, wrong = list[UseText](), list[str]()
        for path in files_of(self.place):
            try:
                found.append(read_text(path))
            except FileNotFoundError:  # dropped meanwhile
                continue
            except ValueError as error:
                wrong.append(str(error))
        return longest(found), wrong

    def stored(self) -> Stored:
        """Count the log's files, without reading them."""
        paths = files_of(self.place)
        times = [_time_of(path) for path in paths] or [0.0]
        return Stored(len(paths), sum(map(_size, paths)), times[0], times[-1])

    def erase(self) -> int:
        """Delete all texts of the log; return how many there were. Raises OSError."""
        paths = files_of(self.place)
        for path in paths:
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (self.place / ABOUT).unlink()
        with contextlib.suppress(OSError):  # a text has come meanwhile
            self.place.rmdir()
        return len(paths)

    def _newest(self) -> dict[Path, UseText]:
        recent = dict[Path, UseText]()
        for path in files_of(self.place)[-RECENT:]:
            with contextlib.suppress(ValueError, FileNotFoundError):
                recent[path] = read_text(path)
        return recent

    def _write(self, path: Path, text: UseText) -> int:
        for folder in (self.folder, self.place):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = self.place / ABOUT
        # The first text of this process: the model may have another name than before.
        if self._since > _RECOUNT or not about.is_file():
            write_private(about, json.dumps(self.model._asdict()))
        return write_private(path, json.dumps({"answer": text.answer, "tokens": text.tokens.tolist()}))


def use_logs(folder: Path) -> list[UseLog]:
    """Return the logs in `folder`. A log whose model nobody can tell any more is called by its folder."""
    logs = []
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not place.is_dir():
            continue
        try:
            log = UseLog(folder, model_of(place))
        except ValueError:
            log = UseLog(folder, UsedModel(place.name, ""))
        log.place = place
        if files_of(place):
            logs.append(log)
    return logs


def model_of(place: Path) -> UsedModel:
    """Read which model the log in the folder `place` is of. Raises ValueError, naming the file, when it is damaged."""
    values = Values(read_object(place / ABOUT))
    with naming(place / ABOUT):
        return UsedModel(*(values.text(name) for name in UsedModel._fields))


def read_text(path: Path) -> UseText:
    """Read the file of a text. Raises FileNotFoundError; ValueError, naming the file, when it is damaged."""
    if not path.exists():
        raise FileNotFoundError(path)
    values = Values(read_object(path))
    with naming(path):
        name = _NAME.fullmatch(path.name)
        if name is None:
            raise ValueError("no text of use is called so")
        tokens = values.wholes("tokens", 0, LARGEST - 1)
        answer = values.whole("answer", 1, max(1, len(tokens) - 1))
        if len(tokens) < 2:
            raise ValueError(f"a text of {len(tokens)} tokens")
        return UseText(array("i", tokens), answer, name[2], int(name[1]) / 1e9)


def longest(texts: Sequence[UseText]) -> list[UseText]:
    """Return the texts that no other of `texts` goes on from, in their order."""
    # In the order of their tokens a text stands behind those that it begins with: only these wait on the stack.
    order = sorted(range(len(texts)), key=lambda i: (_sortable(texts[i].prompt), len(texts[i].tokens)))
    dropped, waiting = set[int](), list[int]()
    for i in order:
        while waiting and texts[i].tokens[: texts[waiting[-1]].answer] != texts[waiting[-1]].prompt:
            waiting.pop()
        dropped.update(other for other in waiting if goes_on(texts[i], texts[other]))
        dropped.update([i] if any(o not in dropped and goes_on(texts[o], texts[i]) for o in waiting) else ())
        waiting.append(i)
    return [text for i, text in enumerate(texts) if i not in dropped]


def _sortable(tokens: array[int]) -> bytes:
    """Return bytes that sort as the token ids do."""
    swapped = tokens[:]
    if sys.byteorder == "little":
        swapped.byteswap()
    return swapped.tobytes()


def drop_oldest(folder: Path, limit: int) -> int:
    """Delete the oldest texts of all logs in `folder` where together they have more than `limit` bytes; return the
    bytes that are left. The newest text stays, whatever its size."""
    files = sorted((path for place in _places(folder) for path in files_of(place)), key=lambda path: path.name)
    sizes = {path: _size(path) for path in files}
    total = sum(sizes.values())
    if total <= limit:
        return total
    for path in files[:-1]:
        if total <= _ROOM * limit:
            break
        path.unlink(missing_ok=True)
        total -= sizes[path]
    return total


def files_of(place: Path) -> list[Path]:
    """Return the files of texts in the folder of a log, the oldest first."""
    try:
        names = sorted(name for name in os.listdir(place) if _NAME.fullmatch(name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [place / name for name in names]


def write_private(path: Path, text: str) -> int:
    """Write `text` to `path` for its owner alone, whole or not at all; return its bytes. Raises OSError."""
    data = text.encode()
    with replacing(path) as temporary:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as stream:
            stream.write(data)
    return len(data)


def _places(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from (folder / name for name in os.listdir(folder))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _time_of(path: Path) -> float:
    return int(path.name[:20]) / 1e9
