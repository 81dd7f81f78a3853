"""Kinds of values in a body: each checks a value, and describes itself in words and as JSON Schema.

`objects.py` has the kinds that hold others by name.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, Protocol

from specdec.server.errors import ApiError, bad_request

Schema = dict[str, Any]
_SHOWN = 60  # characters of a wrong value


class Kind(Protocol):
    """Describe a kind of value."""

    @property
    def words(self) -> str:
        """Return what a value must be, as an error says it after "must be"."""

    @property
    def schema(self) -> Schema:
        """Return the JSON Schema of such values."""

    def takes(self, value: Any) -> bool:
        """Return whether `value` has the JSON type of this kind."""

    def read(self, value: Any, where: str) -> Any:
        """Return `value` as programs take it. Raises ApiError, which names the field `where`, for a wrong one."""


def wrong(kind: Kind, value: Any, where: str) -> ApiError:
    """Return the error for a value that is not of its kind."""
    return bad_request(f"{where or 'the body'} must be {kind.words}, got {shown(value)}", where or None)


_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = _SHOWN
_shortener.maxlevel = 3


def shown(value: Any) -> str:
    """Return the beginning of a value, for a message."""
    text = _shortener.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


@dataclass(frozen=True)
class Number:
    """Describe a number from `least` to `most`."""

    least: float
    most: float

    @property
    def words(self) -> str:
        """Return the range in words."""
        return f"a number between {self.least:g} and {self.most:g}"

    @property
    def schema(self) -> Schema:
        """Return the range as a schema."""
        return {"type": "number", "minimum": self.least, "maximum": self.most}

    def takes(self, value: Any) -> bool:
        """Return whether `value` is a number."""
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def read(self, value: Any, where: str) -> float:
        """Return the number; a whole one that no float can hold is compared before it is converted."""
        if not self.takes(value) or not self.least <= value <= self.most:
            raise wrong(self, value, where)
        return float(value)


@dataclass(frozen=True)
class Whole:
    """Describe a whole number from `least` to `most`, which is not 0 where `nonzero`."""

    least: int
    most: int
    nonzero: bool = False

    @property
    def words(self) -> str:
        """Return the range in words."""
        if self.least == self.most:
            return str(self.least)
        return f"a whole number between {self.least} and {self.most}{' but not 0' if self.nonzero else ''}"

    @property
    def schema(self) -> Schema:
        """Return the range as a schema."""
        made: Schema = {"type": "integer", "minimum": self.least, "maximum": self.most}
        return made | ({"not": {"const": 0}} if self.nonzero else {})

    def takes(self, value: Any) -> bool:
        """Return whether `value` is a number."""
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def read(self, value: Any, where: str) -> int:
        """Return the number; 3.0 is one, as some languages write whole numbers so."""
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if not isinstance(number, int) or isinstance(number, bool) or not self.least <= number <= self.most:
            raise wrong(self, value, where)
        if self.nonzero and number == 0:
            raise wrong(self, value, where)
        return number


@dataclass(frozen=True)
class Flag:
    """Describe true or false."""

    words = "true or false"

    @property
    def schema(self) -> Schema:
        """Return the type."""
        return {"type": "boolean"}

    def takes(self, value: Any) -> bool:
        """Return whether `value` is true or false."""
        return isinstance(value, bool)

    def read(self, value: Any, where: str) -> bool:
        """Return the value."""
        if not isinstance(value, bool):
            raise wrong(self, value, where)
        return value


@dataclass(frozen=True)
class Text:
    """Describe a string; one of `choices` where there are any."""

    choices: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Return the choices in words."""
        return f"one of {', '.join(self.choices)}" if self.choices else "a string"

    @property
    def schema(self) -> Schema:
        """Return the choices as a schema."""
        return {"type": "string"} | ({"enum": list(self.choices)} if self.choices else {})

    def takes(self, value: Any) -> bool:
        """Return whether `value` is a string."""
        return isinstance(value, str)

    def read(self, value: Any, where: str) -> str:
        """Return the string."""
        if not isinstance(value, str) or (self.choices and value not in self.choices):
            raise wrong(self, value, where)
        return value


@dataclass(frozen=True)
class Items:
    """Describe a list of `least` to `most` values of one kind. `each`: what they are, in words."""

    of: Kind
    each: str
    least: int = 0
    most: int | None = None

    @property
    def words(self) -> str:
        """Return the bounds in words."""
        least = f", {self.least} or more" if self.least else ""
        return f"a list of {'' if self.most is None else f'at most {self.most} '}{self.each}{least}"

    @property
    def schema(self) -> Schema:
        """Return the bounds as a schema."""
        made: Schema = {"type": "array", "items": self.of.schema}
        made |= {"minItems": self.least} if self.least else {}
        return made | ({} if self.most is None else {"maxItems": self.most})

    def takes(self, value: Any) -> bool:
        """Return whether `value` is a list."""
        return isinstance(value, list)

    def read(self, value: Any, where: str) -> list[Any]:
        """Return the values, each of them read."""
        if not isinstance(value, list) or len(value) < self.least or len(value) > (self.most or len(value)):
            raise wrong(self, value, where)
        return [self.of.read(one, f"{where}[{i}]") for i, one in enumerate(value)]


@dataclass(frozen=True, init=False)
class Either:
    """Describe a value of one of several kinds, which are told apart by their JSON types."""

    kinds: tuple[Kind, ...]

    def __init__(self, *kinds: Kind) -> None:
        object.__setattr__(self, "kinds", kinds)

    @property
    def words(self) -> str:
        """Return the kinds in words."""
        return ", or ".join(kind.words for kind in self.kinds)

    @property
    def schema(self) -> Schema:
        """Return the kinds as a schema."""
        return {"anyOf": [kind.schema for kind in self.kinds]}

    def takes(self, value: Any) -> bool:
        """Return whether `value` has the JSON type of one of the kinds."""
        return any(kind.takes(value) for kind in self.kinds)

    def read(self, value: Any, where: str) -> Any:
        """Return the value, read by the first kind that takes its type."""
        for kind in self.kinds:
            if kind.takes(value):
                return kind.read(value, where)
        raise wrong(self, value, where)


@dataclass(frozen=True)
class Refused:
    """Refuse a value that a protocol has and this server has not, lest it be lost in silence. `why` goes on after the
    field's name; `allowed` are values that ask for nothing."""

    why: str
    allowed: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Return what may come."""
        return " or ".join(["left out", *(repr(one) for one in self.allowed)])

    @property
    def schema(self) -> Schema:
        """Return the values that ask for nothing."""
        return {"enum": list(self.allowed)} if self.allowed else {"type": "null"}

    def takes(self, value: Any) -> bool:
        """Return true: the field is this one, whatever it holds."""
        return True

    def read(self, value: Any, where: str) -> None:
        """Refuse every value but those that ask for nothing."""
        if value not in self.allowed:
            raise bad_request(f"{where} {self.why}", where)
