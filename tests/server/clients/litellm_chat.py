"""The ten turns of an agent through litellm, as Aider asks them: python litellm_chat.py ADDRESS FILE."""

from __future__ import annotations

import json
import os
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch the newest prices
import litellm

address, turns = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
litellm.telemetry = False
tools = [{"type": "function", "function": tool} for tool in turns["tools"]]
history: list[Any] = [{"role": "system", "content": turns["system"]}]


def ask(turn: str, messages: list[Any] | None = None, stream: bool = True, **body: Any) -> Any:
    """Ask, streamed unless told otherwise; print what came, and keep it in the history of the chat."""
    asked: dict[str, Any] = {
        "model": "openai/any",
        "api_base": f"{address}/v1",
        "api_key": "none",
        "num_retries": 0,
        "messages": messages or history,
        "temperature": 0,
        "max_tokens": turns["limit"],
        **body,
    }
    if stream:
        chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
        reply: Any = litellm.stream_chunk_builder(chunks, messages=asked["messages"])
    else:
        reply = litellm.completion(**asked)
    (choice,) = reply.choices
    message = choice.message
    calls = [
        {"id": call.id, "name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in message.tool_calls or ()
    ]
    reasoning = getattr(message, "reasoning_content", None) or ""
    usage = reply.usage
    shown = {"text": message.content or "", "reasoning": reasoning, "calls": calls, "finish": choice.finish_reason}
    counts = {"prompt": usage.prompt_tokens, "cached": usage.prompt_tokens_details.cached_tokens}
    print(json.dumps({"turn": turn, **shown, **counts}), flush=True)
    if messages is None:
        history.append(message.model_dump(exclude_none=True))
    return message


def say(text: str) -> None:
    history.append({"role": "user", "content": text})


def results(message: Any) -> None:
    for call, text in zip(message.tool_calls, cycle(turns["results"]), strict=False):
        history.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": text})


say("hello")
ask("hello", tools=tools, stream=False)
say("weather in Oslo?")
results(ask("call", tools=tools, tool_choice={"type": "function", "function": {"name": "weather"}}))
ask("result", tools=tools)
say("and read the file")
results(ask("calls", tools=tools, tool_choice="required", **turns["two_calls"]))
ask("results", tools=tools)
say("sum up as JSON")
form = {"type": "json_schema", "json_schema": {"name": "summary", "schema": turns["schema"], "strict": True}}
ask("schema", tools=tools, response_format=form)
say("spell the alphabet up to l")
ask("stop", tools=tools, stop=["m"])
ask("title", [{"role": "user", "content": "A title for: " + turns["system"]}], max_tokens=8)
say("think")
ask("think", tools=tools, reasoning_effort="high", allowed_openai_params=["reasoning_effort"])
say("and now without")
ask("after", tools=tools, reasoning_effort="none", allowed_openai_params=["reasoning_effort"])
try:
    ask("error", temperature=-1)
except litellm.exceptions.BadRequestError as error:
    print(json.dumps({"turn": "error", "status": error.status_code, "message": str(error)}))
ask("long", [{"role": "user", "content": turns["long"]}])
