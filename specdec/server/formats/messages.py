"""Messages and tools as OpenAI's clients send them, in the one shape that chat templates take.

Content is a string, null or a list of parts; `developer` means `system`; arguments of earlier calls come as JSON text.
The parts of one message are joined without anything between; with a picture or a sound among them they stay parts, for
the template to say where it is. System messages at the beginning are one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.util.json_text import parse_json

Message = dict[str, Any]


class FieldError(ValueError):
    """Report a field of a request's body that cannot be used. `param`: the field's full name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


_MEDIA = ("image", "audio")
_ROLES = {"developer": "system", "function": "tool"} | {one: one for one in ("system", "user", "assistant", "tool")}


def conversation(messages: Any) -> list[Message]:
    """Return `messages` in the shape of templates. Raises FieldError for what is no conversation."""
    if not isinstance(messages, list) or not messages:
        raise FieldError("messages", "must be a list with at least one message")
    found = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    system = next((i for i, message in enumerate(found) if message["role"] != "system"), len(found))
    if system > 1:
        texts = [message["content"] for message in found[:system] if message["content"]]
        found = [{"role": "system", "content": "\n\n".join(texts)}, *found[system:]]
    return found


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise FieldError(where, "must be an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise FieldError(f"{where}.role", f"must be one of {', '.join(_ROLES)}, got {role!r}")
    made: Message = {"role": _ROLES[role], "content": content_of(message.get("content"), f"{where}.content")}
    if isinstance(made["content"], list) and made["role"] not in ("user", "tool"):
        raise FieldError(f"{where}.content", "pictures and sound belong to a user's message, or to a tool's result")
    if made["role"] == "assistant":
        if calls := _calls(message.get("tool_calls"), f"{where}.tool_calls"):
            made["tool_calls"] = calls
        thought = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(thought, str) and thought:
            made["reasoning_content"] = thought
        if not made["content"] and isinstance(refusal := message.get("refusal"), str):
            made["content"] = refusal
    if made["role"] == "tool":
        for key in ("tool_call_id", "name"):
            if isinstance(value := message.get(key), str):
                made[key] = value
    return made


def content_of(content: Any, where: str) -> str | list[Message]:
    """Return a message's content: text, or parts where pictures and sound, of which only the type is kept, are among
    them. Raises FieldError for other parts."""
    if not isinstance(content, list) or not any(map(_is_medium, content)):
        return text_of(content, where)
    return [
        {"type": part["type"]} if _is_medium(part) else {"type": "text", "text": text_of([part], where)}
        for part in content
    ]


def _is_medium(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _MEDIA


def text_of(content: Any, where: str) -> str:
    """Return a message's content as text. Raises FieldError for parts that are not text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError(where, "must be a string, null, or a list of parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if kind == "refusal":
            text = part.get("refusal")
        elif kind not in (None, "text", "input_text", "output_text"):
            raise FieldError(f"{where}[{i}]", f"parts of type {kind!r} are not supported; send text")
        if not isinstance(text, str):
            raise FieldError(f"{where}[{i}].text", "must be a string")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, where: str) -> list[Message]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise FieldError(where, "must be a list")
    made = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str):
            raise FieldError(f"{where}[{i}].function.name", "must be a string")
        arguments = _arguments(function.get("arguments"), f"{where}[{i}].function.arguments")
        made.append({"type": "function", "function": {"name": name, "arguments": arguments}})
        if isinstance(identity := call.get("id"), str):
            made[-1]["id"] = identity
    return made


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise FieldError(where, f"must be the text of a JSON object, and is not JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise FieldError(where, "must be the text of a JSON object")
    return arguments


def functions(tools: Any) -> list[Message]:
    """Return the tools that are functions, as templates take them; other kinds are left out. Raises FieldError."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise FieldError("tools", "must be a list")
    made = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise FieldError(f"tools[{i}]", "must be an object")
        if tool.get("type", "function") != "function":
            continue
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise FieldError(f"tools[{i}].function", "must be an object")
        name = function.get("name")
        if not isinstance(name, str) or not name or any(not letter.isprintable() for letter in name):
            raise FieldError(f"tools[{i}].function.name", "must be a name")
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise FieldError(f"tools[{i}].function.parameters", "must be a JSON schema")
        told = {key: value for key, value in function.items() if key != "strict" and value is not None}
        made.append({"type": "function", "function": told})
    return made


def tagged(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """Return `messages` for a template that knows nothing of tools: the tools are told in the system message, calls
    stand in the assistant's own text, and results in a user's message."""
    made: list[Message] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            written = [f"<tool_call>\n{_written(call['function'])}\n</tool_call>" for call in calls]
            parts = [message["content"], *written] if message["content"] else written
            made.append({"role": "assistant", "content": "\n".join(parts)})
        elif message["role"] == "tool":
            result = _joined("<tool_response>\n", message["content"], "\n</tool_response>")
            if made and made[-1].get("results"):
                made[-1]["content"] = _joined(made[-1]["content"], "\n", result)
            else:
                made.append({"role": "user", "content": result, "results": True})
        else:
            made.append({"role": message["role"], "content": message["content"]})
    made = [{key: value for key, value in message.items() if key != "results"} for message in made]
    if not tools:
        return made
    told = _told(tools)
    if made and made[0]["role"] == "system":
        return [{"role": "system", "content": f"{made[0]['content']}\n\n{told}".lstrip()}, *made[1:]]
    return [{"role": "system", "content": told}, *made]


def _joined(*contents: str | list[Message]) -> str | list[Message]:
    """Return contents one after the other: text, or parts where one of them has parts."""
    if all(isinstance(content, str) for content in contents):
        return "".join(map(str, contents))
    return [
        part
        for content in contents
        for part in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
    ]


def _written(function: Message) -> str:
    name, arguments = json.dumps(function["name"], ensure_ascii=False), function["arguments"]
    return f'{{"name": {name}, "arguments": {json.dumps(arguments, ensure_ascii=False)}}}'


def _told(tools: Sequence[Message]) -> str:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"These functions can be called. Each line describes one of them, with a JSON schema of its arguments:\n{lines}"
        '\n\nA call is written like this:\n<tool_call>\n{"name": "NAME", "arguments": {"KEY": "VALUE"}}\n</tool_call>\n'
        "Write nothing after a call. The results come in the next message."
    )
