"""A conversation that is to be answered, in one form for all protocols: OpenAI's chat form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.server.body.conversations import EFFORTS
from specdec.server.body.objects import Fields
from specdec.server.errors import bad_request
from specdec.server.media import read_content

_SWITCHES = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}


@dataclass(frozen=True)
class Conversation:
    """Hold what is asked. `messages` and `tools` as in OpenAI's chat completions; `wanted`: `tools`, `tool_choice`,
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
    messages = [{**message.values, "content": read_content(message, "content")} for message in body.get("messages", ())]
    names = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
    wanted = {name: body.raw(name) for name in names}
    return Conversation(messages, wanted, read_options(body), read_prediction(body))


def read_prediction(body: Fields) -> str:
    """Return the expected answer in a body: `content` of `prediction`, a string or parts of text."""
    content = prediction.get("content", "") if (prediction := body.get("prediction")) is not None else ""
    if isinstance(content, str):
        return content
    if other := next((part for part in content if part.get("type", "text") != "text"), None):
        raise bad_request(f"{other.where} is no text", other.where)
    return "".join(part.get("text", "") for part in content)


def read_options(body: Fields) -> dict[str, Any]:
    """Return what a request says about thinking, and what it hands to the chat template."""
    reasoning = body.get("reasoning")
    effort = body.get("reasoning_effort") or (reasoning.get("effort") if reasoning is not None else None)
    thinking = EFFORTS.get(effort or "")
    told = body.get("thinking")
    if isinstance(told, Fields):
        told = _SWITCHES.get(told.get("type"))
    for said in (told, body.get("think"), body.get("enable_thinking")):
        if said is not None:
            thinking = EFFORTS[said] if isinstance(said, str) else said
    return {"thinking": thinking, "chat_template_kwargs": body.get("chat_template_kwargs", {})}
