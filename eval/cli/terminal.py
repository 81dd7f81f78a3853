"""The display for a person at a terminal, and the keys that are pressed while nothing reads them.

The module imports nothing heavy: "loading" is on the screen before torch is imported.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from specdec.util.text import visible

_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"  # switch brackets around pasted text on and off


def say_loading(name: str) -> None:
    """Print on stderr that the model `name` is being loaded, where stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"loading {visible(name)}", file=sys.stderr, flush=True)


def keep_paste_brackets() -> None:
    """Ask the terminal to mark pasted text from now on: several lines that wait stay one message."""
    sys.stdout.write(_PASTE_ON)
    sys.stdout.flush()


@contextlib.contextmanager
def keys_waiting() -> Iterator[None]:
    """Let keys that are pressed while nothing reads them wait for the next prompt, unseen; Ctrl-C still interrupts.

    Without this block the terminal would write the keys into the answer that comes, and turn Enter into the character
    of Ctrl-J. Where stdin is no terminal whose settings can be changed, the block does nothing.
    """
    before = _attributes()
    if before is None:
        yield
        return
    import termios

    waiting = _attributes() or before
    waiting[0] &= ~termios.ICRNL
    waiting[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, waiting)
    keep_paste_brackets()
    try:
        yield
    finally:
        sys.stdout.write(_PASTE_OFF)
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextlib.contextmanager
def ordinary_keys() -> Iterator[None]:
    """Give the terminal to another program, such as an editor, as that program expects it; then take it back."""
    before = _attributes()
    if before is None:
        yield
        return
    import termios

    ordinary = _attributes() or before
    ordinary[0] |= termios.ICRNL
    ordinary[3] |= termios.ECHO | termios.ICANON
    sys.stdout.write(_PASTE_OFF)
    sys.stdout.flush()
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, ordinary)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        keep_paste_brackets()


def _attributes() -> list[Any] | None:
    """Return stdin's settings as a terminal, in a new list; None where stdin is no terminal, or where there is no
    termios."""
    try:
        import termios
    except ImportError:  # Windows
        return None
    return termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
