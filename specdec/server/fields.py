"""Read a JSON body field by field: what is missing or null is the default, what is wrong names its field.

Unknown fields are never looked at: clients send more than any server knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.server.errors import bad_request


class Fields:
    """The fields of a JSON object. `where`: how the object's own name begins, for messages about its fields."""

    def __init__(self, values: Any, where: str = "") -> None:
        """Take `values`. Raises ApiError when they are no JSON object."""
        if not isinstance(values, dict):
            raise bad_request(f"{where or 'the body'} must be a JSON object", where or None)
        self.values: dict[str, Any] = values
        self.where = where

    def get(self, name: str) -> Any:
        """Return the field as it came; None where it is missing."""
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Return whether the field is there and not null."""
        return self.values.get(name) is not None

    def path(self, name: str) -> str:
        """Return the field's full name."""
        return f"{self.where}.{name}" if self.where else name

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float | None:
        """Return a number from `least` to `most`."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise bad_request(f"{self.path(name)} must be a number, got {shown(value)}", self.path(name))
        if not least <= value <= most:
            raise bad_request(f"{self.path(name)} must be {span(least, most)}, got {value}", self.path(name))
        return float(value)

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        """Return a whole number from `least` to `most`."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad_request(f"{self.path(name)} must be a whole number, got {shown(value)}", self.path(name))
        if not least <= value <= most:
            raise bad_request(f"{self.path(name)} must be {span(least, most)}, got {value}", self.path(name))
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad_request(f"{self.path(name)} must be true or false, got {shown(value)}", self.path(name))
        return value

    def text(self, name: str, default: str = "") -> str:
        """Return a string."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise bad_request(f"{self.path(name)} must be a string, got {shown(value)}", self.path(name))
        return value

    def items(self, name: str) -> Sequence[Any]:
        """Return a list; an empty one where the field is missing."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise bad_request(f"{self.path(name)} must be a list, got {shown(value)}", self.path(name))
        return value

    def inner(self, name: str) -> Fields:
        """Return the fields of an object; none where it is missing."""
        return Fields({} if self.values.get(name) is None else self.values[name], self.path(name))

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return an object as it came; an empty one where it is missing."""
        return self.inner(name).values


def span(least: float, most: float) -> str:
    """Return a range in words."""
    return f"at least {least:g}" if math.isinf(most) else f"between {least:g} and {most:g}"


def shown(value: Any) -> str:
    """Return the beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
