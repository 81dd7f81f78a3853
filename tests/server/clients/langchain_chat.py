"""The ten turns of an agent through langchain-openai's ChatOpenAI: python langchain_chat.py ADDRESS FILE."""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

address, turns = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
model = ChatOpenAI(
    model="any", base_url=f"{address}/v1", api_key="none", max_retries=0, temperature=0, max_tokens=turns["limit"],
    stream_usage=True,
)  # fmt: skip
tools = [{"type": "function", "function": tool} for tool in turns["tools"]]
bound = model.bind_tools(tools)
history: list[Any] = [SystemMessage(turns["system"])]


def ask(turn: str, chain: Any, messages: list[Any] | None = None, stream: bool = True, **more: Any) -> Any:
    """Ask, streamed unless told otherwise; print what came, and keep it in the history of the chat."""
    asked = messages or history
    if stream:
        reply = None
        for chunk in chain.stream(asked, **more):
            reply = chunk if reply is None else reply + chunk
        assert reply is not None
        reply = AIMessage(
            **{k: v for k, v in reply.model_dump().items() if k != "type" and k in AIMessage.model_fields}
        )
    else:
        reply = chain.invoke(asked, **more)
    calls = [{"id": call["id"], "name": call["name"], "arguments": call["args"]} for call in reply.tool_calls]
    usage = reply.usage_metadata
    shown = {"text": reply.content, "calls": calls, "finish": reply.response_metadata["finish_reason"]}
    counts = {"prompt": usage["input_tokens"], "cached": usage["input_token_details"]["cache_read"]}
    print(json.dumps({"turn": turn, **shown, **counts}), flush=True)
    if messages is None:
        history.append(reply)
    return reply


def results(reply: Any) -> None:
    for call, text in zip(reply.tool_calls, cycle(turns["results"]), strict=False):
        history.append(ToolMessage(text, tool_call_id=call["id"]))


history.append(HumanMessage("hello"))
ask("hello", bound, stream=False)
history.append(HumanMessage("weather in Oslo?"))
results(ask("call", model.bind_tools(tools, tool_choice="weather", parallel_tool_calls=False)))
ask("result", bound)
history.append(HumanMessage("and read the file"))
results(ask("calls", model.bind_tools(tools, tool_choice="required"), **turns["two_calls"]))
ask("results", bound)
history.append(HumanMessage("sum up as JSON"))
schema = {"title": "summary", "description": "a summary", **turns["schema"]}
for method in ("json_schema", "function_calling", "json_mode"):  # which leave the tools out
    found = model.with_structured_output(schema, method=method, include_raw=True).invoke(history)
    assert found["parsing_error"] is None and found["parsed"], found
ask("schema", model.bind_tools(tools, response_format=schema))
history.append(HumanMessage("spell the alphabet up to l"))
ask("stop", bound, stop=["m"])
ask("title", model, [HumanMessage("A title for: " + turns["system"])], max_tokens=8)
history.append(HumanMessage("think"))
ask("think", bound, reasoning_effort="high")
history.append(HumanMessage("and now without"))
ask("after", bound, reasoning_effort="none")
try:
    ask("error", bound, temperature=-1)
except openai.BadRequestError as error:
    print(json.dumps({"turn": "error", "status": error.status_code, "message": str(error), "param": error.param}))
ask("long", model, [HumanMessage(turns["long"])])
