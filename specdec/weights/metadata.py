"""The values that a file gives of itself, checked before they are used.

What: `Values` hands out named values of GGUF metadata, a JSON object or a config by kind (a whole number within bounds,
a finite number, a flag, a text, a list), and refuses others; `read_object` reads a file that holds one JSON object.
`naming` and `foreign` stand around whole readings: an error inside becomes a ValueError of one printable line that
names the file. `quote` writes a value of a file for people. Why one place: a file can hold anything in place of
anything, and each reader would otherwise check only its author's ideas. Left out: checks that only one format needs,
such as where a tensor may lie.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST = 1 << 31  # no size, count or position in a model is larger
_SHOWN = 80  # characters of a value in a message
_MESSAGE = 2000  # characters of a message: one may list many names


class Values:
    """Check named values of one source: a mapping, or an object with attributes.

    Each method raises ValueError, with the value's full name, when the value is missing without a default, or is of
    another kind. None counts as missing.
    """

    def __init__(self, source: Mapping[str, Any] | object, prefix: str = "") -> None:
        """Keep the source. `prefix`: the text before every name in the source."""
        self._source, self.prefix = source, prefix

    def find(self, name: str) -> Any:
        """Return the value as it is; None where there is none."""
        full = self.prefix + name
        if isinstance(self._source, Mapping):
            return self._source.get(full)
        return getattr(self._source, full, None)

    def has(self, name: str) -> bool:
        """Tell whether there is such a value."""
        return self.find(name) is not None

    def whole(self, name: str, low: int = 0, high: int = LARGEST, default: int | None = None) -> int:
        """Return a whole number from `low` to `high`."""
        value = self._needed(name, default)
        return self._whole(name, value, low, high)

    def wholes(self, name: str, low: int = 0, high: int = LARGEST, length: int | None = None) -> list[int]:
        """Return a list of whole numbers, `length` of them."""
        return [self._whole(name, value, low, high) for value in self.sequence(name, length)]

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """Return a finite number from `low` to `high`, whole ones as floats."""
        value = self._needed(name, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        raise self.wrong(name, f"a number from {low:g} to {high:g}", value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """Return True or False."""
        value = self._needed(name, default)
        if isinstance(value, bool):
            return value
        raise self.wrong(name, "true or false", value)

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text."""
        value = self._needed(name, default)
        if isinstance(value, str):
            return value
        raise self.wrong(name, "a text", value)

    def texts(self, name: str, length: int | None = None) -> list[str]:
        """Return a list of texts, `length` of them."""
        values = self.sequence(name, length)
        for value in values:
            if not isinstance(value, str):
                raise self.wrong(name, "a list of texts", value)
        return values

    def sequence(self, name: str, length: int | None = None) -> list[Any]:
        """Return a list, of `length` values."""
        value = self._needed(name)
        if not isinstance(value, (list, tuple)):
            raise self.wrong(name, "a list", value)
        if length is not None and len(value) != length:
            raise ValueError(f"{quote(self.prefix + name)} lists {len(value)} values where {length} are due")
        return list(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """Return, as it is, an object inside this one."""
        value = self._needed(name)
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object", value)
        return dict(value)

    def inner(self, name: str) -> Values:
        """Return the values of an object inside this one."""
        return Values(self.mapping(name))

    def wrong(self, name: str, due: str, value: Any) -> ValueError:
        """Return the error for a `value` where `due` is expected."""
        return ValueError(f"{quote(self.prefix + name)} must be {due}, and is {quote(value)}; fetch it again")

    def _needed(self, name: str, default: Any = None) -> Any:
        value = self.find(name)
        if value is None and default is None:
            raise ValueError(f"there is no {quote(self.prefix + name)}, which is needed; fetch it again")
        return default if value is None else value

    def _whole(self, name: str, value: Any, low: int, high: int) -> int:
        try:
            number = operator.index(value)  # numpy's and torch's are numbers too
        except (TypeError, RuntimeError):
            number = low - 1
        if isinstance(value, bool) or not low <= number <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}", value)
        return number


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`. Raises ValueError, naming the file, for anything else."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file; put the file of that name in its place")
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({_reason(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {quote(value)} where a JSON object is due; fetch it again")
    return value


def check_texts(value: Any, keys_only: bool = False) -> None:
    """Raise a ValueError when a text or a key anywhere inside a JSON value holds characters that a terminal obeys.

    It is for values that another library may print as they are. `keys_only`: texts may hold anything.
    """
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Mapping):
            for key in found:
                if not str(key).isprintable():
                    raise ValueError(f"it has a key {quote(key)}, which is no name; fetch it again")
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str) and not keys_only and not found.replace("\n", " ").isprintable():
            raise ValueError(f"it holds {quote(found)}, which is no text; fetch it again")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add `path` to a ValueError of the block, on one printable line. Other exceptions pass."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        if os.fspath(path) in message and message == one_line(message):
            raise
        about = message if os.fspath(path) in message else f"{path}: {message}"
        raise _like(error, one_line(about)) from error


@contextmanager
def foreign(
    path: str | os.PathLike[str], advice: str = "fetch it again", what: str = "cannot be read"
) -> Iterator[None]:
    """Turn any exception of another library in the block into a ValueError: `path`: `what` (why); `advice`.

    transformers, tokenizers and safetensors raise kinds of their own, and kinds that a damaged file causes (TypeError,
    KeyError, ...). Panics of libraries in Rust are not even an Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(one_line(f"{path}: {what} ({_reason(error)}); {advice}")) from error


def quote(value: Any) -> str:
    """Return a value of a file for a message: printable, and not longer than a line."""
    if isinstance(value, str):
        return _cut(repr(value[: 2 * _SHOWN]))
    if isinstance(value, (list, tuple, dict)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)} values"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return _cut(one_line(repr(value)))


def one_line(text: str) -> str:
    """Return `text` on one line, with an escape for each character that a terminal obeys: names in files hold any.

    It keeps such characters as escapes, where `specdec.util.text.printable` drops them: a name in an error must be told
    from its neighbours.
    """
    if text.isprintable() and len(text) <= _MESSAGE:
        return text
    if len(text) > _MESSAGE:
        text = f"{text[: _MESSAGE // 2]} ... {text[-_MESSAGE // 2 :]}"
    text = " ".join(text.split("\n"))
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def finite(values: Any) -> bool:
    """Tell whether all of an iterable of floats are finite."""
    return all(map(math.isfinite, values))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def _reason(error: BaseException) -> str:
    strerror = getattr(error, "strerror", None)  # of an OSError, and of PyAV's, whose text names the file again
    if isinstance(strerror, str) and strerror:
        return strerror
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _like(error: ValueError, message: str) -> ValueError:
    """Return a ValueError of the same kind where that kind takes a message, so that callers can tell kinds apart."""
    kind = type(error)
    return (
        kind(message)
        if kind.__init__ is ValueError.__init__ or kind.__init__ is Exception.__init__
        else ValueError(message)
    )
