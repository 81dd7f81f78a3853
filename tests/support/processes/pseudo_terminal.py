"""A terminal that a test sits at: a command's output as it comes, keys, pastes, and another size of the window."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")
CTRL_C, CTRL_D, CTRL_J, ENTER, UP, TAB = "\x03", "\x04", "\n", "\r", "\x1b[A", "\t"
ALT_ENTER = "\x1b\r"


class PseudoTerminal:
    """Runs `command` in a terminal of its own, of `columns` by 40."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], columns: int = 120) -> None:
        # No answers to questions about the cursor come from here.
        variables = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):  # the size is the terminal's own
            variables.pop(name, None)
        self.raw = ""
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs tests in the background is deaf to it
            os.execvpe(command[0], list(command), variables)
        self.resize(columns)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def keys(self, text: str) -> None:
        os.write(self.handle, text.encode("utf-8", "surrogateescape"))

    def paste(self, text: str) -> None:
        """As terminals do: brackets around it, where the program has asked for them, and Enter's code for newlines."""
        text = text.replace("\n", "\r")
        on = self.raw.rfind("\x1b[?2004h") > self.raw.rfind("\x1b[?2004l")
        self.keys(f"\x1b[200~{text}\x1b[201~" if on else text)

    @property
    def text(self) -> str:
        """All that has come, without escape sequences."""
        return _ESCAPES.sub("", self.raw).replace("\r", "").replace("\b", "")

    def until(self, sign: str, seconds: float = 90) -> str:
        """Wait for `sign`; return what came up to it, and forget that."""
        end = time.monotonic() + seconds
        while (at := self.text.find(sign)) < 0:
            ready, _, _ = select.select([self.handle], [], [], max(0, end - time.monotonic()))
            chunk = b""
            if ready:
                try:
                    chunk = os.read(self.handle, 65536)
                except OSError:  # Linux: the program has ended
                    chunk = b""
            if not chunk:
                raise AssertionError(f"no {sign!r} in {self.text!r}")
            self.raw += chunk.decode("utf-8", "replace")
        before = self.text[: at + len(sign)]
        brackets = max(self.raw.rfind("\x1b[?2004h"), self.raw.rfind("\x1b[?2004l"))
        state = self.raw[brackets : brackets + 8] if brackets >= 0 else ""
        self.raw = state + self.text[at + len(sign) :]
        return before

    def until_pressed(self, keys: str, sign: str) -> str:
        """Press `keys` until `sign` comes: Python's readline does not see a Ctrl-C that comes just before it waits."""
        for _ in range(8):
            self.keys(keys)
            with contextlib.suppress(AssertionError):
                return self.until(sign, seconds=10)
        raise AssertionError(f"no {sign!r} in {self.text!r}")

    def status(self) -> int:
        """Wait for the end, and return the exit status."""
        with_end = False
        while not with_end:
            try:
                with_end = not os.read(self.handle, 65536)
            except OSError:
                with_end = True
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.handle)
