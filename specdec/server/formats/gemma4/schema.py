"""From a JSON schema to a grammar of Gemma 4's argument syntax.

Strings, objects and lists are written as Gemma writes them; numbers are left to llguidance's own JSON schemas. Keys
come in the order of Gemma's template, so that a call in the history reads as it was written. What JSON schema allows
and nobody means is left out: a key that `properties` does not name, unless `additionalProperties` asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from specdec.server.formats.gemma4.keywords import (
    NUMBERS,
    SAYS_NOTHING,
    UNSUPPORTED,
    branches,
    resolve,
    string_terminal,
    types_of,
)
from specdec.server.formats.gemma4.syntax import PLAIN_KEY, QUOTE, in_order, written, written_key

MOST_RULES = 4096  # of a request's schemas: a reference beside other keywords is written out wherever it stands


class GemmaSchema:
    """Collect the rules of a Lark grammar, to which each schema adds. `quote`: the id of the mark around strings."""

    def __init__(self, quote: int, strict: bool = False, prefix: str = "") -> None:
        """Begin without rules. `strict`: a keyword that the grammar cannot keep is an error, and not left out.
        `prefix`: of the rules' names."""
        self._quote, self.strict, self._prefix = f"<[{quote}]>", strict, prefix
        self._rules: dict[str, str] = {}
        self._of_reference: dict[str, str] = {}
        self._root: Any = {}

    @property
    def text(self) -> str:
        """Return the rules as text."""
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())

    def arguments(self, schema: dict[str, Any]) -> str:
        """Return the name of a rule for an object that `schema` describes. Raises ValueError for a schema that no value
        fits, or, where strict, for a keyword that the grammar cannot keep."""
        self._root, self._of_reference = schema, {}
        try:
            return self._value({"type": "object", **schema})
        except (
            TypeError,
            AttributeError,
            LookupError,
            OverflowError,
            RecursionError,
        ) as error:  # numbers where lists belong, say
            raise ValueError("is no JSON schema that can be followed") from error

    def _rule(self, body: str) -> str:
        if len(self._rules) >= MOST_RULES:
            raise ValueError(f"takes more than {MOST_RULES:,} rules; write a simpler schema")
        name = f"{self._prefix}v{len(self._rules)}"
        self._rules[name] = body
        return name

    def _value(self, schema: Any) -> str:
        """Return the name of the rule for values of `schema`."""
        if schema is True or schema == {} or schema is None:
            return self._any()
        if not isinstance(schema, dict):
            raise ValueError("a schema that no value fits")
        if isinstance(reference := schema.get("$ref"), str):
            beside = sorted(
                key for key in schema if key != "$ref" and key not in SAYS_NOTHING and not key.startswith("$")
            )
            if self.strict and beside:
                raise ValueError(f"{', '.join(beside)}: not supported beside $ref")
            return self._reference(reference)
        if self.strict and (unknown := sorted(UNSUPPORTED & {*schema})):
            raise ValueError(f"{', '.join(unknown)}: not supported")
        if "const" in schema:
            return self._literals([schema["const"]])
        if isinstance(values := schema.get("enum"), list):
            return self._literals(values)
        if (several := branches(self._root, schema)) is not None:
            return self._rule(" | ".join(self._value(one) for one in several))
        kinds = types_of(schema)
        if len(kinds) > 1:
            return self._rule(" | ".join(self._typed(kind, schema) for kind in kinds))
        return self._typed(kinds[0], schema) if kinds else self._any()

    def _reference(self, reference: str) -> str:
        if reference not in self._of_reference:
            self._of_reference[reference] = name = self._rule("")  # may be met again before it is known
            self._rules[name] = self._value(resolve(self._root, reference))
        return self._of_reference[reference]

    def _typed(self, kind: str, schema: dict[str, Any]) -> str:
        makers: dict[str, Callable[[dict[str, Any]], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
        }
        if kind in makers:
            return makers[kind](schema)
        if kind == "boolean":
            return self._rule('"true" | "false"')
        if kind == "null":
            return self._rule('"null"')
        kept = {key: schema[key] for key in NUMBERS if key in schema}
        return self._rule(f"%json {json.dumps({'type': kind, **kept})}")

    def _any(self) -> str:
        """Return the rule for any value."""
        any_, string, pair, text = (f"{self._prefix}{name}" for name in ("any", "string", "pair", "text"))
        if any_ not in self._rules:
            scalar = '%json {"type": ["number", "boolean", "null"]}'
            pairs = f'({pair} ("," {pair})*)?'
            self._rules[any_] = f'{string} | {scalar} | "{{" {pairs} "}}" | "[" ({any_} ("," {any_})*)? "]"'
            self._rules[string] = f"{self._quote} {text.upper()}? {self._quote}"
            self._rules[pair] = f'{self._key()} ":" {any_}'
            self._rules[text.upper()] = r"/(.|\n)+/"
        return any_

    def _any_string(self) -> str:
        self._any()
        return f"{self._prefix}string"

    def _key(self) -> str:
        """Return the rule for any key."""
        self._rules.setdefault(f"{self._prefix}key", f"{self._prefix.upper()}KEY | {self._any_string()}")
        self._rules.setdefault(f"{self._prefix.upper()}KEY", f"/{PLAIN_KEY}/")
        return f"{self._prefix}key"

    def _literals(self, values: list[Any]) -> str:
        if not values:
            raise ValueError("enum: has no values")
        return self._rule(" | ".join(self._literal(written(value)) for value in values))

    def _literal(self, text: str) -> str:
        """Return a text of the syntax, marks included, as items of a rule."""
        parts = text.split(QUOTE)
        items: list[str] = []
        for i, part in enumerate(parts):
            items += [self._quote] if i else []
            items += [json.dumps(part, ensure_ascii=False)] if part else []
        return " ".join(items)

    def _string(self, schema: dict[str, Any]) -> str:
        if (found := string_terminal(schema, self.strict)) is None:
            return self._any_string()
        terminal, empty = found
        name = f"{self._prefix}s{len(self._rules)}".upper()
        self._rules[name] = terminal
        return self._rule(f"{self._quote} {name}{'?' if empty else ''} {self._quote}")

    def _array(self, schema: dict[str, Any]) -> str:
        least, most = int(schema.get("minItems") or 0), schema.get("maxItems")
        items = schema.get("items", True)
        first = [self._value(one) for one in schema.get("prefixItems") or []]
        rest = None if items is False else self._value(items)
        if not first and rest is not None:
            first = [rest]
        if most is not None:
            if int(most) < least:
                raise ValueError("maxItems: less than minItems")
            first = first[: int(most)]
        body = ""
        if rest is not None and (most is None or int(most) > len(first)):
            upper = "" if most is None else int(most) - len(first)
            body = f'("," {rest}){{{max(0, least - len(first))},{upper}}}'
        elif least > len(first):
            raise ValueError("minItems: more than the items that there are")
        for i in reversed(range(len(first))):
            item = f'"," {first[i]} {body}' if i else f"{first[i]} {body}"
            body = item if i < least else f"({item})?"
        return self._rule(f'"[" {body} "]"')

    def _object(self, schema: dict[str, Any]) -> str:
        properties = schema.get("properties") or {}
        required = [key for key in schema.get("required") or [] if isinstance(key, str)]
        further = schema.get("additionalProperties", "properties" not in schema)
        known = {**dict.fromkeys(required, True if further is False else further), **properties}
        pairs = [
            (f'{self._literal(written_key(key))} ":" {self._value(known[key])}', key in required)
            for key in in_order(known)
            if key in required or known[key] is not False
        ]
        extra = None
        if further is not False:
            extra = f'{self._key()} ":" {self._value(further)}'
        # after[i]: what follows the first i pairs where one was written; first[i]: where none was.
        after = self._rule(f'("," {extra})*' if extra else '""')
        first = self._rule(f'({extra} ("," {extra})*)?' if extra else '""')
        for pair, needed in reversed(pairs):
            written_here = f"{pair} {after}"
            first = self._rule(written_here if needed else f"{written_here} | {first}")
            after = self._rule(f'"," {written_here}' if needed else f'"," {written_here} | {after}')
        return self._rule(f'"{{" {first} "}}"')
