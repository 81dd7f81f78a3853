"""Schemas of tools in Gemma 4's syntax: what is put together, what is refused, and how far a schema may grow."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest

from specdec.server.formats.gemma4.keywords import branches, merged, resolve
from specdec.server.formats.gemma4.schema import MOST_RULES, GemmaSchema
from specdec.server.formats.messages import FieldError
from specdec.server.formats.wanted import Wanted


def rules(schema: dict[str, Any], strict: bool = False) -> str:
    made = GemmaSchema(7, strict)
    made.arguments(schema)
    return made.text


def doubling(levels: int) -> dict[str, Any]:
    """A schema of `levels` levels, each of which has the next one twice, beside a keyword of its own."""
    steps = [{"$ref": f"#/$defs/n{i + 1}"} for i in range(levels)]
    nodes: dict[str, Any] = {
        f"n{i}": {"type": "object", "properties": {"a": {"anyOf": [steps[i], steps[i]], "minProperties": 1}}}
        for i in range(levels)
    }
    properties = {"x": {"$ref": "#/$defs/n0"}}
    return {"type": "object", "properties": properties, "$defs": {**nodes, f"n{levels}": {"type": "string"}}}


def test_a_schema_that_doubles_with_every_level_is_refused_soon() -> None:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=f"takes more than {MOST_RULES:,} rules"):
        rules(doubling(24))
    assert time.perf_counter() - began < 5
    assert len(rules(doubling(3)).splitlines()) < 100


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#"}]},
        {"properties": [1]},
        {"properties": {"a": {"type": "object", "properties": {}, "required": 5}}},
        {"properties": {"a": {"type": "array", "minItems": [1]}}},
        {"properties": {"a": {"type": "string", "maxLength": {}}}},
        {"properties": {"a": {"type": "string", "format": ["x"]}}},
        {"properties": {"a": {"$ref": "#", "": 1}}},
        {"properties": {"a": {"anyOf": [{"type": "string"}], "": 1}}},
        *({"properties": {"a": {"type": "array", key: float("inf")}}} for key in ("minItems", "maxItems")),
        {"properties": {"a": {"type": "string", "maxLength": float("inf")}}},
    ],
)
def test_what_is_no_schema_is_a_value_error_or_passed_over(schema: dict[str, Any]) -> None:
    for strict in (False, True):
        made = ""
        with suppress(ValueError):
            made = rules(schema, strict)
        assert made == "" or ": " in made  # any other error would have come through


def test_nothing_is_lost_beside_a_reference_where_it_counts() -> None:
    schema = {"properties": {"a": {"$ref": "#/$defs/s", "maxLength": 3}}, "$defs": {"s": {"type": "string"}}}
    assert rules(schema)
    with pytest.raises(ValueError, match=r"maxLength: not supported beside \$ref"):
        rules(schema, strict=True)
    said = {"properties": {"a": {"$ref": "#/$defs/s", "description": "a name"}}, "$defs": {"s": {"type": "string"}}}
    assert rules(said, strict=True)


def test_references() -> None:
    root = {"$defs": {"a/b": [{"type": "null"}], "t~": True}}
    assert resolve(root, "#") is root
    assert resolve(root, "#/$defs/a~1b/0") == {"type": "null"} and resolve(root, "#/$defs/t~0") is True
    for reference in ("#/nothing", "#/$defs/a~1b/7", "#/$defs/t~0/x", "#/$defs/a~1b/x"):
        with pytest.raises(ValueError, match=r"\$ref: nothing is at"):
            resolve(root, reference)
    with pytest.raises(ValueError, match="is not in the schema itself"):
        resolve(root, "https://example.org/schema")


def test_branches_have_the_keywords_that_stand_beside_them() -> None:
    assert branches({}, {"type": "string"}) is None
    parts = branches({}, {"properties": {"a": {}}, "required": ["a"], "anyOf": [{"required": ["b"]}, {"$ref": "#"}]})
    assert parts is not None and parts[0] == {"properties": {"a": {}}, "required": ["a", "b"]}
    both = branches({}, {"anyOf": [{"type": "string"}], "oneOf": [{"maxLength": 3}], "title": "t"})
    assert both == [{"oneOf": [{"maxLength": 3}], "type": "string"}]
    whole = branches({}, {"type": "object", "allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]})
    assert whole == [{"type": "object", "properties": {"a": {}, "b": {}}}]
    root = {"$defs": {"s": {"type": "string"}}}
    assert merged(root, {"title": "t"}, {"$ref": "#/$defs/s", "maxLength": 2}) == {
        "title": "t",
        "maxLength": 2,
        "type": "string",
    }
    assert merged({}, {"type": "string"}, True) == {"type": "string"} and merged({}, {}, False) is False


@pytest.mark.parametrize("those", [5, {"a": 1}, "f"])
def test_allowed_tools_are_a_list(those: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(FieldError, match="must be a list"):
        Wanted.of({"tools": tools, "tool_choice": {"type": "allowed_tools", "tools": those}})
