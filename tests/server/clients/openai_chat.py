"""The ten turns of an agent through openai's chat completions: python openai_chat.py ADDRESS TURNS_FILE."""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import openai

address, turns = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
tools = [{"type": "function", "function": tool} for tool in turns["tools"]]
history: list[Any] = [{"role": "system", "content": turns["system"]}]


def ask(turn: str, messages: list[Any] | None = None, **body: Any) -> Any:
    """Ask, streamed unless told otherwise; print what came, and keep it in the history of the chat."""
    body = {"model": "any", "messages": messages or history, "temperature": 0, "max_tokens": turns["limit"], **body}
    if not body.get("stream", True):
        reply = client.chat.completions.create(**body)
        (choice,) = reply.choices
        return note(turn, choice.message, choice.finish_reason, reply.usage, messages is None)
    with client.chat.completions.stream(**{k: v for k, v in body.items() if k != "stream"}, **USAGE) as stream:
        for _ in stream:
            pass
        reply = stream.get_final_completion()
    (choice,) = reply.choices
    return note(turn, choice.message, choice.finish_reason, reply.usage, messages is None)


def note(turn: str, message: Any, finish: str, usage: Any, kept: bool) -> Any:
    calls = [
        {"id": call.id, "name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in message.tool_calls or ()
    ]
    reasoning = getattr(message, "reasoning_content", None) or ""
    cached, prompt = usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens
    shown = {"text": message.content or "", "reasoning": reasoning, "calls": calls, "finish": finish}
    print(json.dumps({"turn": turn, **shown, "prompt": prompt, "cached": cached}), flush=True)
    if kept:
        said = {"role": "assistant", "content": message.content}
        if message.tool_calls:
            said["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in message.tool_calls
            ]
        if reasoning:
            said["reasoning_content"] = reasoning
        history.append(said)
    return message


def say(text: str) -> None:
    history.append({"role": "user", "content": text})


def results(message: Any) -> None:
    for call, text in zip(message.tool_calls, cycle(turns["results"]), strict=False):
        history.append({"role": "tool", "tool_call_id": call.id, "content": text})


USAGE: Any = {"stream_options": {"include_usage": True}}
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
ask("title", [{"role": "user", "content": "A title for: " + turns["system"]}], max_tokens=8, stream=False)
say("think")
ask("think", tools=tools, reasoning_effort="high")
say("and now without")
ask("after", tools=tools, reasoning_effort="none")
try:
    ask("error", temperature=-1)
except openai.BadRequestError as error:
    print(json.dumps({"turn": "error", "status": error.status_code, "message": str(error), "param": error.param}))
ask("long", [{"role": "user", "content": turns["long"]}])
