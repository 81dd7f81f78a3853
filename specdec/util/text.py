"""Text that people type and that files hold: characters that may be shown, valid text for a tokenizer, near names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CONTROL = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")
_CONTROLS = re.compile(r"\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FIRST = 300  # letters of the first line of an error: a compiler puts whole programs there
_LONGEST = 100  # letters; comparing takes time that grows with the square, and nobody mistypes a longer name


def printable(text: str) -> str:
    """Return `text` without its control characters (C0, DEL and C1), except line ends and tabs.

    Text of others (names, prompts, metadata of files) reaches a terminal in this form, or in a `Terminal` of
    `specdec.util.terminal`, which applies it: an escape sequence would move the cursor, or type into the shell. Nothing
    takes the place of a character, so that columns of a table stay as wide as they were measured.
    """
    return text.translate(_CONTROL)


def visible(text: str) -> str:
    """Return `text` with a visible sign for every control character but newline and tab, as a model's words are shown.

    A terminal obeys control sequences wherever they come from: its title, its colours, even its answers to a program
    could be changed by them.
    """
    return _CONTROLS.sub(lambda found: _sign(found.group()), text)


def _sign(control: str) -> str:
    if control == "\r\n":
        return "\n"
    code = ord(control)
    if code < 0x20:
        return chr(0x2400 + code)  # the block "Control Pictures"
    return "␡" if code == 0x7F else f"\\x{code:02x}"


def check_text(text: str, what: str) -> None:
    """Raise a ValueError when `text` holds half a surrogate pair; `what` names the text in the message.

    A JSON file can hold one, and so can a command line that is not UTF-8; no tokenizer takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line, character = text.count("\n", 0, error.start) + 1, error.start - text.rfind("\n", 0, error.start)
        where = f"line {line:,}, character {character:,}" if "\n" in text else f"character {character:,}"
        raise ValueError(
            f"{what} is not text: {where} is {text[error.start]!a}, half of a surrogate pair; write it as UTF-8"
        ) from None


def describe_error(error: BaseException) -> str:
    """Return the type of an error, and the first line of what it says: "RuntimeError: no kernel image"."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:_FIRST]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?", with the name of `known` that is nearest to `word`; "" where none is near."""
    from difflib import get_close_matches  # as long to import as all else here, and rarely needed

    names = {name.casefold(): name for name in known}
    near = get_close_matches(word.casefold(), names, n=1) if len(word) <= _LONGEST else []
    return f" Did you mean {names[near[0]]}?" if near else ""
