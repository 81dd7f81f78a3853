"""What a request wants its answer to look like: tools that may or must be called, and the form of the content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdec.server.formats.messages import FieldError, functions

MOST_SCHEMA = 2**18  # characters of all schemas of a request, as JSON
MOST_STRING = 2**12  # characters of a key or a value in a schema, but for what is said to people
_SAID = ("description", "title", "$comment", "default", "examples", "example")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
ANYTHING: dict[str, Any] = {"type": "object"}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """Hold a function that may be called. `index`: its place in the request. `strict`: its schema must be kept to the
    letter, or refused; otherwise keywords that a grammar does not know are left out."""

    index: int
    name: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class Wanted:
    """Describe what an answer may be. `calls`: "auto", "none" or "required"; `parallel`: more than one call, never
    where a request names the tool; `schema`: of the content, JSON then, None for any text."""

    tools: tuple[Tool, ...] = ()
    calls: str = "auto"
    parallel: bool = True
    schema: dict[str, Any] | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Wanted:
        """Read `tools`, `tool_choice`, `parallel_tool_calls` and `response_format` of a body in OpenAI's form. Raises
        FieldError."""
        tools = _tools(body.get("tools"))
        choice = body.get("tool_choice")
        calls, tools = _choice(choice, tools)
        named = isinstance(choice, Mapping) and choice.get("type") != "allowed_tools"
        parallel = body.get("parallel_tool_calls")
        if parallel is not None and not isinstance(parallel, bool):
            raise FieldError("parallel_tool_calls", "must be true or false")
        return cls(tools, calls, parallel is not False and not named, _schema(body.get("response_format")))

    def check(self) -> None:
        """Raise FieldError for schemas that take a grammar minutes, or end the process: llguidance 1.9 recurses without
        end over the constant -2**63, as no whole number of 64 bits is its opposite."""
        schemas = [(f"tools[{tool.index}].function.parameters", tool.parameters) for tool in self.tools]
        schemas += [] if self.schema is None else [("response_format.json_schema.schema", self.schema)]
        for field, schema in schemas:
            if (longest := _longest(schema)) > MOST_STRING:
                raise FieldError(field, f"has a string of {longest} characters; at most {MOST_STRING} can be kept to")
            if _largest(schema) >= 2**63:
                raise FieldError(field, "has a constant of more than 64 bits, which cannot be kept to")
        if (size := sum(len(json.dumps(schema)) for _, schema in schemas)) > MOST_SCHEMA:
            raise FieldError(schemas[-1][0], f"schemas have {size} characters together; at most {MOST_SCHEMA} are read")

    @property
    def names(self) -> list[str]:
        """Return the names that may be called, as a parser takes them."""
        return [] if self.calls == "none" else [tool.name for tool in self.tools]

    @property
    def free(self) -> bool:
        """Return whether the answer may be anything, and no constraint is needed."""
        return not self.tools and self.schema is None


def _longest(schema: Any) -> int:
    """Return the length of the longest string in a schema."""
    if isinstance(schema, str):
        return len(schema)
    if isinstance(schema, Mapping):
        inner = (one for key, one in schema.items() if not (key in _SAID and isinstance(one, str)))
        return max((*map(len, schema), *map(_longest, inner)), default=0)
    return max(map(_longest, schema), default=0) if isinstance(schema, list) else 0


def _largest(schema: Any) -> float:
    """Return the largest number in a schema, without its sign; bounds, which are often those of 64 bits, do no harm."""
    if isinstance(schema, (int, float)):
        return abs(schema)
    if isinstance(schema, Mapping):
        return max((_largest(one) for key, one in schema.items() if key not in _BOUNDS), default=0)
    return max(map(_largest, schema), default=0) if isinstance(schema, list) else 0


def _tools(given: Any) -> tuple[Tool, ...]:
    functions(given)  # which checks their shape
    found = []
    for i, tool in enumerate(given or ()):
        if tool.get("type", "function") == "function":
            function = tool["function"]
            parameters = dict(function.get("parameters") or NOTHING)
            found.append(Tool(i, function["name"], parameters, function.get("strict") is True))
    return tuple(found)


def _choice(choice: Any, tools: tuple[Tool, ...]) -> tuple[str, tuple[Tool, ...]]:
    """Return how calls are wanted, and the tools that may be called."""
    if choice is None or choice == "auto":
        return "auto", tools
    if choice == "none":
        return "none", tools
    if choice in ("required", "any"):
        names, mode = [tool.name for tool in tools], "required"
    elif isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        inner = allowed if isinstance(allowed, Mapping) else choice
        if not isinstance(those := inner.get("tools") or [], list):
            raise FieldError("tool_choice.tools", "must be a list")
        names = [_named(one) for one in those]
        mode = "required" if inner.get("mode") == "required" else "auto"
    elif isinstance(choice, Mapping):
        names, mode = [_named(choice)], "required"
    else:
        raise FieldError("tool_choice", "must be auto, none, required, or name a function")
    known = {tool.name for tool in tools}
    if unknown := [name for name in names if name not in known]:
        raise FieldError("tool_choice", f"there is no tool {unknown[0]!r} in tools")
    if not names:
        raise FieldError("tool_choice", "needs tools, and there are none")
    return mode, tuple(tool for tool in tools if tool.name in names)


def _named(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = (function if isinstance(function, Mapping) else choice).get("name") if isinstance(choice, Mapping) else None
    if not isinstance(name, str):
        raise FieldError("tool_choice.function.name", "must be a string")
    return name


def _schema(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise FieldError("response_format", "must be an object")
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = given.get("schema")
        return dict(schema) if isinstance(schema, Mapping) else ANYTHING
    if kind != "json_schema":
        raise FieldError("response_format.type", "must be text, json_object or json_schema")
    inner = given.get("json_schema", given)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise FieldError("response_format.json_schema.schema", "must be a JSON schema")
    return dict(schema)
