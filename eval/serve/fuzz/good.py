"""Good bodies of every endpoint, which damaged ones are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 2},
        "when": {"anyOf": [{"type": "string", "pattern": "^[0-9]{4}$"}, {"$ref": "#/$defs/day"}]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "object", "properties": {"day": {"type": "boolean"}}}},
}
_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Name three rivers, é 丁 😀."}
_PARTS = {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "text", "text": "<|im_end|>"}]}
_FUNCTION = {"name": "weather", "description": "Tells the weather.", "parameters": _SCHEMA, "strict": False}
_TOOL = {"type": "function", "function": _FUNCTION}
_CALLED = {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
_LOOP: list[dict[str, Any]] = [
    _USER,
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
        {"id": "c1", "type": "function", "function": _CALLED},
    ]},
    {"role": "tool", "tool_call_id": "c1", "content": "sun"},
]  # fmt: skip
_LIMITS: dict[str, Any] = {"max_tokens": 2}
_MOST: dict[str, Any] = {
    **{"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 7},
    **{"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"65": -5, "66": 5.5}, "stop": ["\n\n", "x"]},
    **{"ignore_eos": False, "user": "me", "metadata": {"a": "b"}, "model": "any", **_LIMITS},
}
_PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}


class Good(NamedTuple):
    """Hold a path, and a body that it answers with 200 (or 400, where `refused`)."""

    path: str
    body: dict[str, Any]
    refused: bool = False


_CHAT, _TEXT, _MESSAGES, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
GOOD: Sequence[Good] = (
    Good(_CHAT, {"messages": [_SYSTEM, _USER, _PARTS], **_MOST}),
    Good(_CHAT, {"messages": [_USER], "n": 2, "logprobs": True, "top_logprobs": 2, **_LIMITS}),
    Good(_CHAT, {"messages": [_USER], "stream": True, "stream_options": {"include_usage": True}, **_LIMITS}),
    Good(_CHAT, {"messages": _LOOP, "tools": [_TOOL], "tool_choice": "auto", "parallel_tool_calls": False, **_LIMITS}),
    Good(_CHAT, {
        "messages": [_USER], "tools": [_TOOL, {"type": "web_search"}], "stream": True, **_LIMITS,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    }),
    Good(_CHAT, {"messages": [_USER], **_LIMITS, "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": _SCHEMA},
    }}),
    Good(_CHAT, {"messages": [_USER], "response_format": {"type": "json_object"}, "stream": True, **_LIMITS}),
    Good(_CHAT, {"messages": [_USER], "prediction": {"type": "content", "content": "abc"}, "reasoning_effort": "low",
                 "thinking": {"type": "enabled"}, "chat_template_kwargs": {"x": [1]}, **_LIMITS}),
    Good(_CHAT, {"messages": [{"role": "user", "content": [_PICTURE]}], **_LIMITS}, refused=True),
    Good(_TEXT, {"prompt": "once upon", "echo": True, "logprobs": 2, **_MOST}),
    Good(_TEXT, {"prompt": ["a", [70, 71, 72]], "n": 2, "stream": True, "suffix": "", **_LIMITS}),
    Good(_RESPONSES, {"input": "hello", "instructions": "Be brief.", "reasoning": {"effort": "low"}, **_MOST}),
    Good(_RESPONSES, {"input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"role": "user", "content": "hello"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "sun"},
    ], "tools": [{"type": "function", **_FUNCTION}], "stream": True, "max_output_tokens": 2}),
    Good(_RESPONSES, {"input": "x", "max_output_tokens": 2, "text": {
        "format": {"type": "json_schema", "name": "x", "schema": _SCHEMA, "strict": True},
    }}),
    Good(_MESSAGES, {"system": [{"type": "text", "text": "Be brief."}], "messages": [_USER], **_MOST}),
    Good(_MESSAGES, {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Rome"}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [
            {"type": "text", "text": "sun"}]}]},
    ], "tools": [{"name": "weather", "description": "x", "input_schema": _SCHEMA}], "stream": True,
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, **_LIMITS}),
    Good(_MESSAGES, {"messages": [_USER], "output_config": {
        "format": {"type": "json_schema", "schema": _SCHEMA}}, "stop_sequences": ["z"], **_LIMITS}),
    Good(f"{_MESSAGES}/count_tokens", {"messages": [_USER], "system": "Be brief.", "thinking": {"type": "disabled"}}),
    Good("/tokenize", {"content": "héllo", "add_special": True}),
    Good("/tokenize", {"messages": [_USER], "tools": [_TOOL], "add_generation_prompt": False}),
    Good("/tokenize", {"prompt": "hello", "add_special_tokens": False}),
    Good("/detokenize", {"tokens": [70, 71, 72]}),
)  # fmt: skip
