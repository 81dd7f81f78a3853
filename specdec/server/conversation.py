"""A conversation that is to be answered, in one form for all protocols: OpenAI's chat form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.server.errors import bad_request
from specdec.server.fields import Fields, shown
from specdec.server.media import read_content

EFFORTS = {"none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True, "max": True}
"""Words for how much a model should think, and whether it then thinks at all."""


@dataclass(frozen=True)
class Conversation:
    """What is asked. `messages` and `tools` as in OpenAI's chat completions; `wanted`: `tools`, `tool_choice`,
    `parallel_tool_calls` and `response_format`; `options`: `thinking` and `chat_template_kwargs`, for the template;
    `prediction`: the answer that the client expects, as far as it knows."""

    messages: Sequence[dict[str, Any]]
    wanted: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prediction: str = ""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Return the tools that are functions; others (web search and their like) are run by nobody here."""
        given = self.wanted.get("tools") or []
        return [tool for tool in given if not isinstance(tool, dict) or tool.get("type", "function") == "function"]


def read_conversation(body: Fields) -> Conversation:
    """Return the conversation of a chat completion's body. Raises ApiError for settings that cannot be used."""
    messages = [_message(one, f"messages[{i}]") for i, one in enumerate(body.items("messages"))]
    tools = list(body.items("tools"))
    names = ("tool_choice", "parallel_tool_calls", "response_format")
    wanted = {"tools": tools} | {name: body.get(name) for name in names}
    return Conversation(messages, wanted, read_options(body), read_prediction(body))


def read_prediction(body: Fields) -> str:
    """Return the expected answer in a body: `content` of `prediction`, a string or parts of text."""
    prediction = body.inner("prediction")
    kind = prediction.text("type", "content")
    if kind != "content":
        raise bad_request(f"prediction.type must be content, got {shown(kind)}", "prediction.type")
    if isinstance(prediction.get("content"), str):
        return prediction.text("content")
    parts = [Fields(part, f"prediction.content[{i}]") for i, part in enumerate(prediction.items("content"))]
    if other := next((part for part in parts if part.text("type", "text") != "text"), None):
        raise bad_request(f"{other.where} is no text", other.where)
    return "".join(part.text("text") for part in parts)


def _message(message: Any, where: str) -> Any:
    return (
        {**message, "content": read_content(Fields(message, where), "content")}
        if isinstance(message, dict)
        else message
    )


def read_options(body: Fields) -> dict[str, Any]:
    """Return what a request says about thinking, and what it hands to the chat template."""
    effort = body.text("reasoning_effort") or body.inner("reasoning").text("effort")
    if effort and effort not in EFFORTS:
        raise bad_request(f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort!r}", "reasoning_effort")
    thinking = EFFORTS.get(effort)
    told = body.get("thinking")
    if isinstance(told, dict) and told.get("type") in ("enabled", "adaptive", "between_tools", "disabled"):
        thinking = told["type"] != "disabled"
    for name in ("think", "enable_thinking"):
        if isinstance(body.get(name), bool):
            thinking = body.get(name)
    return {"thinking": thinking, "chat_template_kwargs": dict(body.mapping("chat_template_kwargs"))}
