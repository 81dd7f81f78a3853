"""Questions whose answers have to be of a form: content by a JSON schema, or calls of tools; and whether they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from eval.server.served import AT_A_TIME, Served

_TEXT = {"type": "string", "maxLength": 24}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {"name": _TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 120}, "member": {"type": "boolean"}},
    "recipe": {"title": _TEXT, "steps": {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 3}},
    "weather": {"city": _TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}, "days": {"type": "integer", "maximum": 14}},
    "alarm": {"time": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"}, "repeat": {"type": ["string", "null"]}},
    "edit": {"path": _TEXT, "old": _TEXT, "new": _TEXT, "all": {"type": "boolean"}},
    "point": {"place": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                        "required": ["x", "y"], "additionalProperties": False}},
    "order": {"items": {"type": "array", "maxItems": 2, "items": {"type": "object", "additionalProperties": False,
              "properties": {"what": _TEXT, "count": {"type": "integer", "minimum": 1}}, "required": ["what"]}}},
    "choice": {"answer": {"enum": ["yes", "no", "maybe"]}, "why": {"anyOf": [_TEXT, {"type": "null"}]}},
}  # fmt: skip
_SUBJECTS = ("Oslo", "a rainy day", "the file main.py", "Ada", "seven in the morning", "bread", "number 42", "the moon")


@dataclass(frozen=True)
class Task:
    """Describe a question: `wanted` are the fields of the request that say what the answer must look like."""

    name: str
    messages: list[dict[str, str]]
    wanted: dict[str, Any]
    schemas: dict[str, dict[str, Any]]  # by tool; of the content under the name ""


@dataclass(frozen=True)
class Outcome:
    """Keep how an answer ended: `valid`, cut by the length (`cut`), or neither, with what was `wrong`."""

    task: str
    valid: bool
    cut: bool
    wrong: str = ""


def schema_tasks(count: int) -> list[Task]:
    """Return `count` questions for JSON by a schema."""
    return [_task(i, "schema") for i in range(count)]


def tool_tasks(count: int) -> list[Task]:
    """Return `count` questions for a call of one of two tools."""
    return [_task(i, "tool") for i in range(count)]


def answers(served: Served, tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Answer `tasks`, sampled, several at a time, and yield how each ended."""

    def one(numbered: tuple[int, Task]) -> Outcome:
        number, task = numbered
        limit = served.session.settings.max_new_tokens
        body = {"messages": task.messages, "temperature": 0.8, "seed": number, "max_tokens": limit}
        choice = served.ask({**body, **task.wanted})["choices"][0]
        wrong = "" if choice["finish_reason"] == "length" else _wrong(task, choice["message"])
        cut = choice["finish_reason"] == "length"
        return Outcome(task.name, not cut and not wrong, cut, wrong)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield from pool.map(one, enumerate(tasks))


def answers_record(found: Sequence[Outcome]) -> dict[str, Any]:
    """Return the counts, and each answer that is wrong, in JSON types."""
    wrong = [asdict(one) for one in found if one.wrong]
    valid = sum(one.valid for one in found)
    return {"total": len(found), "valid": valid, "cut": sum(one.cut for one in found), "wrong": wrong}


def _task(number: int, kind: str) -> Task:
    names = list(_SCHEMAS)
    first, second = names[number % len(names)], names[(number + 3) % len(names)]
    subject = _SUBJECTS[(number // len(names) + number) % len(_SUBJECTS)]
    messages = [{"role": "user", "content": f"Give me a {first} about {subject}, please. This is request {number}."}]
    if kind == "schema":
        form = {"type": "json_schema", "json_schema": {"name": first, "schema": _object(first)}}
        return Task(f"{first} by schema", messages, {"response_format": form}, {"": _object(first)})
    tools = [
        {"type": "function", "function": {"name": f"make_{name}", "parameters": _object(name)}}
        for name in (first, second)
    ]
    schemas = {f"make_{name}": _object(name) for name in (first, second)}
    wanted = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    return Task(f"{first} by call", messages, wanted, schemas)


def _object(name: str) -> dict[str, Any]:
    parts = _SCHEMAS[name]
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _wrong(task: Task, message: dict[str, Any]) -> str:
    """Return what is wrong with an answer; nothing where it is as the task wants it."""
    import jsonschema  # type: ignore[import-untyped]

    try:
        if "" in task.schemas:
            jsonschema.validate(json.loads(message["content"]), task.schemas[""])
        else:
            (call,) = message["tool_calls"]
            function = call["function"]
            jsonschema.validate(json.loads(function["arguments"]), task.schemas[function["name"]])
    except (ValueError, KeyError, TypeError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}; {json.dumps(message)[:300]}"
    return ""
