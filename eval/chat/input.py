"""Messages and commands one by one, from what a person types or pastes, or from a pipe.

At a terminal `Prompt` edits messages of several lines with prompt_toolkit; `Lines` reads a pipe, and terminals that
cannot move the cursor. Both know blocks: the text between two lines with three quotation marks is one message. Why
prompt_toolkit and not readline: where Python has libedit (macOS, many builds) a pasted text of several lines comes as
so many messages, on Windows there is no readline, and readline neither edits nor remembers several lines as one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from eval.cli.terminal import keep_paste_brackets, ordinary_keys

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completion
    from prompt_toolkit.document import Document

MARK = "> "
_MORE = "  "  # before the second line of a message, and the following ones
_OPENING = re.compile(r'\s*(/system\s+)?"""')
_CLOSING = re.compile(r'"""[ \t]*$', re.MULTILINE)
_WITH_FILES = ("/save", "/load", "/image", "/audio", "/video")
_EDITORS = ("nano", "vim", "vi", "emacs", "notepad")


class Typed(NamedTuple):
    """Keep what came at once. `message`: the text is a message even if it begins as a command does."""

    text: str
    message: bool = False


class Reader(Protocol):
    """Read messages. `read` raises EOFError at the end, and KeyboardInterrupt on Ctrl-C."""

    def read(self) -> Typed:
        """Return the next message or command."""


def unquote(text: str) -> Typed | None:
    """Return the message in `text`, without the quotation marks of a block; None while a block in `text` is open.

    A text that goes on behind its block, such as a Python file with a docstring, is a message as it stands.
    """
    opening = _OPENING.match(text)
    if opening is None:
        return Typed(text)
    closing = _CLOSING.search(text, opening.end())
    if closing is None:
        return None
    if text[closing.end() :].strip():
        return Typed(text, message=True)
    inner = text[opening.end() : closing.start()].removeprefix("\n").removesuffix("\n")
    command = opening[1] or ""
    return Typed(command + inner, message=not command)


class Lines:
    """Read lines of stdin; `person`: a person sits at a terminal, and sees where to type."""

    def __init__(self, person: bool) -> None:
        self.person = person
        if person:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401  # gives input() a history and line editing

    def read(self) -> Typed:
        """Return the next line, or the next block of lines. Raises EOFError at the end of stdin."""
        text = self._line(MARK)
        while (typed := unquote(text)) is None:
            try:
                text += "\n" + self._line(_MORE)
            except EOFError:  # the end of a file ends a block too
                text += '"""'
        return typed

    def _line(self, mark: str) -> str:
        return input(mark if self.person else "")


class Prompt:
    """Edit messages at a terminal: Enter sends, Alt-Enter and Ctrl-J begin another line, the arrows bring former
    messages.

    Tab completes `commands`, and the file names behind those that take a file. `history`: where messages are kept for
    later sessions; None: nowhere.
    """

    def __init__(self, commands: Collection[str], history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, PathCompleter
        from prompt_toolkit.history import InMemoryHistory

        from eval.chat.history import FileHistory

        files = PathCompleter(expanduser=True)

        class Names(Completer):
            def get_completions(self, document: Document, event: Any) -> Iterable[Completion]:
                return _completions(document, event, commands, files)

        self.session: PromptSession[str] = PromptSession(
            MARK,
            multiline=True,
            prompt_continuation=_MORE,
            history=InMemoryHistory() if history is None else FileHistory(history),
            completer=Names(),
            complete_while_typing=False,
            enable_suspend=True,
            enable_open_in_editor=True,  # Ctrl-X Ctrl-E
            tempfile_suffix=".md",
            key_bindings=_keys(),
        )

    def read(self) -> Typed:
        """Return the message that was edited until Enter. Raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
        try:
            text = self.session.prompt()
        finally:
            keep_paste_brackets()
        typed = unquote(text)
        assert typed is not None, "Enter does not send an open block"
        return typed


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if unquote(buffer.text) is None:
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def another_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completions(document: Document, event: Any, commands: Collection[str], files: Any) -> Iterable[Completion]:
    from prompt_toolkit.completion import Completion
    from prompt_toolkit.document import Document

    before = document.text_before_cursor
    word, space, rest = before.partition(" ")
    if "\n" in before or not word.startswith("/"):
        return
    if not space:
        yield from (Completion(name, -len(word)) for name in commands if name.startswith(word))
    elif word in _WITH_FILES:
        yield from files.get_completions(Document(rest), event)


def open_reader(commands: Collection[str], history: Path | None) -> Reader:
    """Return the reader for the stdin and stdout of this process. `history`: see `Prompt`."""
    person = sys.stdin.isatty()
    if edits():
        return Prompt(commands, history)
    if not person and hasattr(sys.stdin, "reconfigure"):
        # Bytes that are no UTF-8 come as surrogates then, and are refused with their message, not with all the rest.
        sys.stdin.reconfigure(errors="surrogateescape")
    return Lines(person)


def edits() -> bool:
    """Tell whether stdin and stdout are a terminal that can move its cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def written_in_editor(text: str) -> str:
    """Open `text` in an editor, and return the edited text; "" when the user leaves the text as it was.

    The editor is $VISUAL, else $EDITOR, else a usual one. Raises ValueError: stdin is no terminal, there is no editor,
    the editor failed, or the file that it left is not UTF-8.
    """
    if not sys.stdin.isatty():
        raise ValueError("an editor needs a terminal")
    command = _editor()
    handle, name = tempfile.mkstemp(prefix="message-", suffix=".md")  # readable for its owner only
    file = Path(name)
    try:
        with open(handle, "w", encoding="utf-8") as written:
            written.write(text)
        try:
            with ordinary_keys():
                status = subprocess.run([*command, name], check=False).returncode
        except OSError as error:
            raise ValueError(f"the editor {command[0]} cannot be started ({error.strerror})") from error
        if status:
            raise ValueError(f"the editor {command[0]} ended with status {status}; nothing was sent")
        try:
            found = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"what the editor left cannot be read ({error}); nothing was sent") from error
        return "" if found == text.strip() else found
    finally:
        file.unlink(missing_ok=True)


def _editor() -> list[str]:
    for name in ("VISUAL", "EDITOR"):
        try:
            words = shlex.split(os.environ.get(name, ""), posix=os.name == "posix")
        except ValueError as error:
            raise ValueError(f"${name} cannot be understood: {error}") from error
        if words:
            if shutil.which(words[0]) is None:
                raise ValueError(f"${name} names {words[0]}, which is not installed; set it to an editor that is")
            return words
    found = next(filter(None, map(shutil.which, _EDITORS)), None)
    if found is None:
        raise ValueError("no editor was found; name one: export EDITOR=...")
    return [found]
