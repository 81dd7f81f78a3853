"""A conversation as clients send it, made into the messages that a chat format takes.

OpenAI's and Anthropic's clients write one thing in many ways: content as a string, null or parts, `developer` for
`system`, arguments of tool calls as JSON text. What comes out has one shape. Nothing that a message names (a URL, a
path) is ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from specdec.server.errors import bad_request
from specdec.server.fields import Fields, shown, well_formed

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def read_messages(body: Fields, name: str = "messages") -> list[dict[str, Any]]:
    """Return the messages of a chat request. Raises ApiError for one that cannot be understood."""
    given = body.items(name)
    if not given:
        raise bad_request(f"{name} must be a list with at least one message", name)
    messages = [_message(Fields(message, f"{name}[{i}]")) for i, message in enumerate(given)]
    return join_system(messages)


def join_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `messages` with the system messages at their beginning in one: templates take one at most."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if first < 2:
        return list(messages)
    content = "\n\n".join(message["content"] for message in messages[:first])
    return [{"role": "system", "content": content}, *messages[first:]]


def _message(message: Fields) -> dict[str, Any]:
    role = message.text("role")
    if role == "function":
        role = "tool"
    if role not in _ROLES:
        raise bad_request(f"{message.path('role')}: there is no role {shown(role)}", message.path("role"))
    made: dict[str, Any] = {"role": _ROLES[role], "content": text_of(message.get("content"), message.path("content"))}
    if role == "assistant":
        if reasoning := message.get("reasoning_content") or message.get("reasoning"):
            made["reasoning_content"] = well_formed(str(reasoning), message.path("reasoning_content"))
        if calls := [_call(message, i, call) for i, call in enumerate(message.items("tool_calls"))]:
            made["tool_calls"] = calls
    if role == "tool":
        made |= {key: message.text(key) for key in ("tool_call_id", "name") if message.has(key)}
    return made


def _call(message: Fields, number: int, given: Any) -> dict[str, Any]:
    call = Fields(given, f"{message.path('tool_calls')}[{number}]")
    function = call.inner("function")
    arguments = arguments_of(function.get("arguments"), function.path("arguments"))
    named = {"name": function.text("name"), "arguments": arguments}
    return {"id": call.text("id"), "type": "function", "function": named}


def arguments_of(given: Any, where: str) -> dict[str, Any]:
    """Return the arguments of a tool call, which come as JSON text or as an object. Raises ApiError for others."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError) as error:
            raise bad_request(f"{where} is not JSON: {error}", where) from error
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise bad_request(f"{where} must be a JSON object, got {shown(given)}", where)
    return given


def text_of(content: Any, where: str) -> str:
    """Return the text of a message's content: a string, null, or a list of parts that are text.

    Parts are joined without a separator. Raises ApiError for a part of another kind.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return well_formed(content, where)
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of parts, got {shown(content)}", where)
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return well_formed(part, where)
    fields = Fields(part, where)
    kind = fields.text("type", "text")
    if kind in _TEXT_PARTS:
        return fields.text("refusal" if kind == "refusal" else "text")
    raise bad_request(f"{where} is of type {shown(kind)}; this model reads text alone", where, "unsupported_content")


def read_tools(body: Fields, name: str = "tools") -> list[dict[str, Any]]:
    """Return the tools that are functions, in OpenAI's shape; other types (web search and their like) are passed
    over."""
    tools = []
    for i, given in enumerate(body.items(name)):
        tool = Fields(given, f"{name}[{i}]")
        if tool.text("type", "function") != "function":
            continue
        function = tool.inner("function") if tool.has("function") else tool
        if not function.text("name"):
            raise bad_request(f"{function.path('name')} is missing", function.path("name"))
        parameters = function.mapping("parameters") or {"type": "object", "properties": {}}
        described = {"name": function.text("name"), "description": function.text("description")}
        tools.append({"type": "function", "function": {**described, "parameters": dict(parameters)}})
    return tools
