"""Objects in a body: their declared fields are checked, and all others passed over.

A field that is missing and one that is null are the same. Clients send more fields than any server knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from specdec.server.body.kinds import Kind, Number, Schema, wrong
from specdec.server.errors import bad_request


@dataclass(frozen=True)
class Field:
    """Describe a field: its name, the kind of its values, and what it means, in Markdown."""

    name: str
    kind: Kind
    about: str = ""
    required: bool = False


class Fields:
    """Hold the fields of an object that has come. `values`: as they came; `where`: the object's own name."""

    def __init__(self, declared: Mapping[str, Field], values: dict[str, Any], where: str) -> None:
        self.values, self.where, self._declared = values, where, declared
        self._read = {
            name: field.kind.read(values[name], self.path(name))
            for name, field in declared.items()
            if values.get(name) is not None
        }
        if missing := next((name for name, field in declared.items() if field.required and not self.has(name)), None):
            raise bad_request(f"{self.path(missing)} is missing", self.path(missing))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field as its kind reads it; `default` where it is missing."""
        assert name in self._declared, f"{name} is not declared"
        return self._read.get(name, default)

    def has(self, name: str) -> bool:
        """Return whether the field is there and not null."""
        assert name in self._declared, f"{name} is not declared"
        return name in self._read

    def raw(self, name: str) -> Any:
        """Return a field as it came; None where it is missing. It was checked all the same."""
        assert name in self._declared, f"{name} is not declared"
        return self.values.get(name)

    def path(self, name: str) -> str:
        """Return the field's full name."""
        return f"{self.where}.{name}" if self.where else name


class Object:
    """Describe an object with declared fields. `name`: what `/openapi.json` calls it."""

    words = "a JSON object"

    def __init__(self, name: str, *fields: Field) -> None:
        self.name = name
        self.fields = {field.name: field for field in fields}

    @cached_property
    def schema(self) -> Schema:
        """Return a reference to the object's schema, which `definition` gives."""
        return {"$ref": f"#/components/schemas/{self.name}"}

    @property
    def definition(self) -> Schema:
        """Return the schema of the object: null stands for a field that is left out, and others may come."""
        made: Schema = {"type": "object", "properties": {name: _nullable(one) for name, one in self.fields.items()}}
        required = [name for name, field in self.fields.items() if field.required]
        return made | ({"required": required} if required else {})

    def takes(self, value: Any) -> bool:
        """Return whether `value` is an object."""
        return isinstance(value, dict)

    def read(self, value: Any, where: str) -> Fields:
        """Return the object's fields."""
        if not isinstance(value, dict):
            raise wrong(self, value, where)
        return Fields(self.fields, value, where)


def _nullable(field: Field) -> Schema:
    told = {"description": field.about} if field.about else {}
    return told | (field.kind.schema if field.required else {"anyOf": [field.kind.schema, {"type": "null"}]})


@dataclass(frozen=True)
class AnyObject:
    """Describe an object that is taken as it comes: a JSON schema, a template's variables."""

    words = "a JSON object"

    @property
    def schema(self) -> Schema:
        """Return the type."""
        return {"type": "object"}

    def takes(self, value: Any) -> bool:
        """Return whether `value` is an object."""
        return isinstance(value, dict)

    def read(self, value: Any, where: str) -> dict[str, Any]:
        """Return the object as it came."""
        if not isinstance(value, dict):
            raise wrong(self, value, where)
        return value


@dataclass(frozen=True)
class TokenNumbers:
    """Describe an object from token ids, in digits, to numbers; at most `most` of them."""

    most: int
    _digits = 9  # which is more than any vocabulary has

    @property
    def words(self) -> str:
        """Return what is in it."""
        return f"an object from at most {self.most} token ids to numbers"

    @property
    def schema(self) -> Schema:
        """Return the bounds as a schema."""
        keys = {"pattern": f"^[0-9]{{1,{self._digits}}}$"}
        numbers = Number(-1e9, 1e9).schema
        return {"type": "object", "propertyNames": keys, "additionalProperties": numbers, "maxProperties": self.most}

    def takes(self, value: Any) -> bool:
        """Return whether `value` is an object."""
        return isinstance(value, dict)

    def read(self, value: Any, where: str) -> dict[int, float]:
        """Return the numbers by token id."""
        if not isinstance(value, dict) or len(value) > self.most:
            raise wrong(self, value, where)
        for token in value:
            if not (token.isascii() and token.isdigit() and len(token) <= self._digits):
                raise bad_request(f"{where}: {token[:40]!r} is no token id", where)
        number = Number(-1e9, 1e9)
        return {int(token): number.read(one, f"{where}.{token}") for token, one in value.items()}
