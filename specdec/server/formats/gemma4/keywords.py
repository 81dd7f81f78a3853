"""What the grammars of arguments need to know of JSON schema: references, branches, types, what strings are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Keywords that narrow a value down and that grammars do not keep; `format` has a table of its own.
UNSUPPORTED = frozenset(
    [
        *("not", "if", "uniqueItems", "contains", "propertyNames", "patternProperties", "minProperties"),
        *("maxProperties", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems"),
    ]
)
SAYS_NOTHING = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "strict")
_HINTS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": NUMBERS,
}
_DATE, _TIME = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
_ZONE = r"(\.[0-9]{1,9})?(Z|[-+]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME + _ZONE,
    "date-time": f"{_DATE}T{_TIME}{_ZONE}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "uuid": "-".join(f"[0-9a-fA-F]{{{n}}}" for n in (8, 4, 4, 4, 12)),
}
_ANY = r"(.|\n)"


def resolve(root: Any, reference: str) -> Any:
    """Return what `reference` points at in the schema `root`. Raises ValueError where there is nothing."""
    if not reference.startswith("#"):
        raise ValueError(f"$ref: {reference!r} is not in the schema itself")
    found = root
    for part in filter(None, unquote(reference[1:]).split("/")):
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"$ref: nothing is at {reference!r}") from error
    return found


def branches(root: Any, schema: Mapping[str, Any]) -> list[Any] | None:
    """Return the schemas of which a value must fit one, by anyOf, oneOf and allOf; None where `schema`
    has none of these keywords.

    Keywords beside these are part of each branch. One-of is taken as any-of.
    """
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "allOf")}
    if isinstance(parts := schema.get("allOf"), list):
        whole: Any = {**rest, **{key: schema[key] for key in ("anyOf", "oneOf") if key in schema}}
        for part in parts:
            whole = merged(root, whole, part)
        return [whole]
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(key), list) and parts:
            says = {
                name: value for name, value in rest.items() if name not in SAYS_NOTHING and not name.startswith("$")
            }
            other = {"oneOf": schema["oneOf"]} if key == "anyOf" and "oneOf" in schema else {}
            says = {**says, **other}
            return [merged(root, says, part) if says else part for part in parts]
    return None


def merged(root: Any, one: Any, other: Any) -> Any:
    """Return a schema for values that fit both, as far as keywords can be put side by side."""
    if isinstance(other, dict) and isinstance(reference := other.get("$ref"), str):
        other = merged(root, resolve(root, reference), {key: value for key, value in other.items() if key != "$ref"})
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one if other is True else other
    both = {**one, **other}
    if "properties" in one and "properties" in other:
        both["properties"] = {**one["properties"], **other["properties"]}
    if "required" in one and "required" in other:
        both["required"] = [*one["required"], *other["required"]]
    return both


def types_of(schema: Mapping[str, Any]) -> list[str]:
    """Return the types of values that `schema` allows; none where it says nothing of types."""
    given = schema.get("type")
    kinds = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    kinds = [str(kind).lower() for kind in kinds]
    if unknown := {*kinds} - {"object", "array", "string", "number", "integer", "boolean", "null"}:
        raise ValueError(f"type: {', '.join(sorted(unknown))} is none of JSON's")
    if not kinds:
        kinds = [kind for kind, hints in _HINTS.items() if any(hint in schema for hint in hints)][:1]
    if schema.get("nullable") is True and kinds and "null" not in kinds:
        kinds.append("null")
    return kinds


def string_terminal(schema: Mapping[str, Any], strict: bool) -> tuple[str, bool] | None:
    """Return a terminal of a Lark grammar for a string's characters, and whether there may be none; None where any
    string fits.

    Raises ValueError, where strict, for a pattern or a format that no terminal keeps; else these are left out.
    """
    parts: list[str] = []
    least, most = int(schema.get("minLength") or 0), schema.get("maxLength")
    empty = least == 0
    for regex in (_of_format(schema, strict), _of_pattern(schema, strict)):
        if regex is not None:
            parts.append(f"/{_escaped(regex)}/")
            empty = empty and _fits_nothing(regex)
    if least or most is not None:
        if most is not None and int(most) < max(least, 1):
            if int(most) < least:
                raise ValueError("maxLength: less than minLength")
            return '""', True
        parts.append(f"/{_ANY}{{{max(1, least)},{'' if most is None else int(most)}}}/")
    if not parts:
        return None
    return " & ".join(parts), empty


def _of_format(schema: Mapping[str, Any], strict: bool) -> str | None:
    name = schema.get("format")
    if strict and name is not None and name not in _FORMATS:
        raise ValueError(f"format: {name} is not supported; use {', '.join(_FORMATS)} or a pattern")
    return _FORMATS.get(name) if isinstance(name, str) else None


def _of_pattern(schema: Mapping[str, Any], strict: bool) -> str | None:
    """Return the pattern as one that a whole string fits."""
    pattern = schema.get("pattern")
    if not isinstance(pattern, str):
        return None
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    inner = pattern[begins : len(pattern) - ends]
    alternatives = re.sub(r"\\.|\[[^\]]*\]", "", inner)
    while (shorter := re.sub(r"\([^()]*\)", "", alternatives)) != alternatives:
        alternatives = shorter
    if re.search(r"\(\?[=!<]", inner) or ((begins or ends) and "|" in alternatives):
        if strict:
            raise ValueError(f"pattern: {pattern} looks around, or has anchors beside alternatives")
        return None
    inner = f"({inner})" if inner else ""
    return f"{'' if begins else _ANY + '*'}{inner}{'' if ends else _ANY + '*'}"


def _fits_nothing(regex: str) -> bool:
    try:
        return re.fullmatch(regex, "") is not None
    except re.error:
        return False


def _escaped(regex: str) -> str:
    """Return `regex` as it stands between slashes in a Lark grammar, with the classes of JSON schema's dialect."""
    from llguidance import regex_to_lark

    return str(regex_to_lark(regex, "dw"))
