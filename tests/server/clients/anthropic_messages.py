"""The ten turns of an agent through anthropic's messages, as Claude Code asks: anthropic_messages.py ADDRESS FILE.

A system block differs in every request, cache marks stand in several places, results of tools come as blocks, and
thoughts are sent back.
"""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any
from uuid import uuid4

import anthropic

address, turns = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
client = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
tools = [{"name": t["name"], "description": t["description"], "input_schema": t["parameters"]} for t in turns["tools"]]
tools[-1]["cache_control"] = {"type": "ephemeral"}
history: list[Any] = []


def ask(turn: str, messages: list[Any] | None = None, **body: Any) -> list[Any]:
    """Ask, streamed unless told otherwise; print what came, keep its blocks, and return its calls."""
    billing = f"x-anthropic-billing-header: cc_version=2.1.328; cch={uuid4().hex[:5]};"
    system = [
        {"type": "text", "text": billing},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": turns["system"], "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ]
    more = {"temperature": 0, **body.pop("more", {})}
    asked: dict[str, Any] = {
        "model": "claude-any",
        "max_tokens": turns["limit"],
        "system": system,
        "messages": messages or history,
        "metadata": {"user_id": "user_1"},
        "extra_body": more,
        **body,
    }
    if not asked.pop("stream", True):
        reply = client.messages.create(**asked)
    else:
        with client.beta.messages.stream(**asked, betas=["interleaved-thinking-2025-05-14"]) as stream:
            for _ in stream:
                pass
            reply = stream.get_final_message()
    texts = [block.text for block in reply.content if block.type == "text"]
    thoughts = [block.thinking for block in reply.content if block.type == "thinking"]
    calls = [block for block in reply.content if block.type == "tool_use"]
    made = [{"id": call.id, "name": call.name, "arguments": call.input} for call in calls]
    shown = {"text": "".join(texts), "reasoning": "".join(thoughts), "calls": made, "finish": reply.stop_reason}
    cached = reply.usage.cache_read_input_tokens
    counts = {"prompt": reply.usage.input_tokens + cached, "cached": cached}
    print(json.dumps({"turn": turn, **shown, **counts}), flush=True)
    if messages is None:
        history.append({"role": "assistant", "content": [block.to_dict() for block in reply.content]})
    return calls


def say(text: str, results: list[Any] | None = None) -> None:
    reminder = {"type": "text", "text": "<system-reminder>none</system-reminder>"}
    said = {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}
    history.append({"role": "user", "content": [*(results or ()), reminder, said]})


def results_of(calls: list[Any]) -> list[Any]:
    contents = [[{"type": "text", "text": turns["results"][0]}], turns["results"][1]]
    return [
        {"type": "tool_result", "tool_use_id": call.id, "content": content, "is_error": i == 1}
        for i, (call, content) in enumerate(zip(calls, cycle(contents), strict=False))
    ]


say("hello")
ask("hello", tools=tools, stream=False)
say("weather in Oslo?")
calls = ask("call", tools=tools, tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True})
history.append({"role": "user", "content": results_of(calls)})
ask("result", tools=tools)
say("and read the file")
calls = ask("calls", tools=tools, tool_choice={"type": "any"}, more=turns["two_calls"])
say("go on", results_of(calls))
ask("results", tools=tools, tool_choice={"type": "auto"})
say("sum up as JSON")
ask("schema", tools=tools, output_config={"format": {"type": "json_schema", "schema": turns["schema"]}})
say("spell the alphabet up to l")
ask("stop", tools=tools, stop_sequences=["m"])
ask("title", [{"role": "user", "content": "A title for this chat"}], max_tokens=8)
say("think")
ask("think", tools=tools, thinking={"type": "enabled", "budget_tokens": 1024})
say("and now without")
ask("after", tools=tools, thinking={"type": "disabled"})
try:
    ask("error", more={"temperature": -1})
except anthropic.BadRequestError as error:
    print(json.dumps({"turn": "error", "status": error.status_code, "message": str(error)}))
ask("long", [{"role": "user", "content": turns["long"]}])
