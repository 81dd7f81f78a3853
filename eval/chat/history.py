"""Messages of former chats, for the arrow keys: a file with one JSON string a line, which only its owner may read.

A history is a convenience: where the file cannot be read or written, the chat goes on without a history or a message.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

from specdec.util.atomic import replacing

MOST = 1000  # messages
_LONGEST = 50_000  # characters of a message that is kept
_LARGEST = 4_000_000  # bytes of the file that are read
_ERRORS = (OSError, ValueError)  # ValueError: a path with a NUL


class FileHistory(History):
    """Keep the history in `file`. A session that begins with more than MOST messages leaves half as many as MOST."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self._newest = ""

    def load_history_strings(self) -> Iterable[str]:
        """Return the messages, newest first."""
        with contextlib.suppress(*_ERRORS):
            found = self._read()
            if len(found) > MOST:
                found = found[-MOST // 2 :]
                with replacing(self.file) as temporary:
                    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                    with open(handle, "w", encoding="utf-8") as written:
                        written.writelines(map(_line, found))
            self._newest = found[-1] if found else ""
            return found[::-1]
        return []

    def store_string(self, string: str) -> None:
        """Add a message, unless it is the newest already."""
        if string == self._newest or not string.strip() or len(string) > _LONGEST:
            return
        self._newest = string
        with contextlib.suppress(*_ERRORS):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # One write at the end of the file: chats in two windows do not mix their lines.
            handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(handle, _line(string).encode())
            finally:
                os.close(handle)

    def _read(self) -> list[str]:
        if not self.file.is_file():
            return []
        with self.file.open("rb") as stored:
            size = stored.seek(0, os.SEEK_END)
            stored.seek(max(0, size - _LARGEST))
            lines = stored.read(_LARGEST).splitlines()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # damaged, or the end of a line whose beginning was not read
                if isinstance(text := json.loads(line), str):
                    found.append(text)
        return found


def _line(text: str) -> str:
    return json.dumps(text) + "\n"  # in ASCII: surrogates can be kept too
