"""The ten turns of an agent through openai's responses, as Codex asks them: python openai_responses.py ADDRESS FILE."""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import openai

address, turns = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
tools: list[Any] = [{"type": "function", "strict": False, **tool} for tool in turns["tools"]]
# Codex offers these too: nobody here runs them.
tools += [
    {"type": "web_search"},
    {"type": "local_shell"},
    {"type": "custom", "name": "apply_patch", "description": "", "format": {"type": "text"}},
]
history: list[Any] = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
]


def ask(turn: str, items: list[Any] | None = None, **body: Any) -> list[Any]:
    """Ask, streamed unless told otherwise; print what came, keep its items, and return its calls."""
    asked: dict[str, Any] = {
        "model": "any",
        "instructions": turns["system"],
        "input": items or history,
        "temperature": 0,
        "max_output_tokens": turns["limit"],
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "session",
        **body,
    }
    if not asked.pop("stream", True):
        reply = client.responses.create(**asked)
    else:
        with client.responses.stream(**asked) as stream:
            for _ in stream:
                pass
            reply = stream.get_final_response()
    calls = [item for item in reply.output if item.type == "function_call"]
    thoughts = [part.text for item in reply.output if item.type == "reasoning" for part in item.content or ()]
    made = [{"id": call.call_id, "name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
    finish = reply.incomplete_details.reason if reply.incomplete_details else "tool_calls" if calls else reply.status
    usage = reply.usage
    shown = {"text": reply.output_text, "reasoning": "".join(thoughts), "calls": made, "finish": finish}
    counts = {"prompt": usage.input_tokens, "cached": usage.input_tokens_details.cached_tokens}
    print(json.dumps({"turn": turn, **shown, **counts}), flush=True)
    if items is None:
        history.extend(item.model_dump(exclude_none=True) for item in reply.output)
    return calls


def say(text: str) -> None:
    history.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]})


def results(calls: list[Any]) -> None:
    for call, text in zip(calls, cycle(turns["results"]), strict=False):
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": text})


say("hello")
ask("hello", tools=tools, stream=False)
say("weather in Oslo?")
results(ask("call", tools=tools, tool_choice={"type": "function", "name": "weather"}))
ask("result", tools=tools)
say("and read the file")
results(ask("calls", tools=tools, tool_choice="required", parallel_tool_calls=True, extra_body=turns["two_calls"]))
ask("results", tools=tools, reasoning={"summary": "auto"})
say("sum up as JSON")
form = {"type": "json_schema", "name": "summary", "schema": turns["schema"], "strict": True}
ask("schema", tools=tools, text={"format": form, "verbosity": "low"})
say("spell the alphabet up to l")
ask("stop", tools=tools, extra_body={"stop": ["m"]})
ask("title", [{"role": "user", "content": "A title for this chat"}], max_output_tokens=8, stream=False)
say("think")
ask("think", tools=tools, reasoning={"effort": "high", "summary": "auto"})
say("and now without")
ask("after", tools=tools, reasoning={"effort": "none"})
try:
    ask("error", temperature=-1)
except openai.BadRequestError as error:
    print(json.dumps({"turn": "error", "status": error.status_code, "message": str(error), "param": error.param}))
ask("long", [{"role": "user", "content": turns["long"]}])
