"""Ten turns of an agent, which every client of `tests/server/clients` goes through, and what has to come of them.

A client gets the address of a server and a file of `TURNS`, and prints a line of JSON for each turn: `text`,
`reasoning`, `calls` (id, name, arguments), `finish`, `prompt` and `cached` tokens.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema

from tests.support.formats.tiny_chat import byte_tokenizer
from tests.support.serving.table_model import ANSWER, THOUGHT

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
READ = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
SUMMARY = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "done": {"type": "boolean"},
        "files": {"type": "integer"},
    },
    "required": ["title", "tags", "done", "files"],
    "additionalProperties": False,
}
PARAMETERS = {"weather": WEATHER, "read_file": READ}
TURNS: dict[str, Any] = {
    "system": "You are an agent that edits files and knows the weather. " * 20,
    "tools": [
        {"name": "weather", "description": "Tells the weather of the coming days.", "parameters": WEATHER},
        {"name": "read_file", "description": "Reads a file.", "parameters": READ},
    ],
    "schema": SUMMARY,
    "results": ["rain, then sun", 'a file of two lines\nwith "quotes" and 雨'],
    # Another call is nearly as good as the end: the first line break is liked more, and the fifth no more.
    "two_calls": {"frequency_penalty": 0.2, "logit_bias": {byte_tokenizer().convert_tokens_to_ids("Ċ"): 1.2}},
    "limit": 400,
    "long": "A long file. " * 1200,
}
NAMES = ("hello", "call", "result", "calls", "results", "schema", "stop", "title", "think", "after")
FINISHED = {"stop", "end_turn", "completed"}
STOPPED = FINISHED | {"stop_sequence"}
CUT = {"length", "max_tokens", "max_output_tokens"}
CALLED = {"tool_calls", "tool-calls", "tool_use", "toolUse"}


def go_through(command: Sequence[str], address: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Run a client; return its lines by turn."""
    file = folder / "turns.json"
    file.write_text(json.dumps(TURNS))
    done = subprocess.run([*command, f"http://{address}", str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["turn"]: line for line in lines}


def check_turns(found: dict[str, dict[str, Any]], drops_thoughts: bool = False) -> None:
    """Check what a client got. `drops_thoughts`: it has no place for them."""
    assert [*found] == [*NAMES, "error", "long"]
    texts = dict.fromkeys(("hello", "result", "results", "think", "after", "long"), ANSWER)
    texts |= {"call": "", "calls": "", "stop": ANSWER[: ANSWER.index("m")], "title": ANSWER[:8]}
    assert {name: found[name]["text"] for name in texts} == texts
    jsonschema.validate(json.loads(found["schema"]["text"]), SUMMARY)
    thoughts = {name: line["reasoning"] for name, line in found.items() if line.get("reasoning")}
    assert thoughts == ({} if drops_thoughts else {"think": THOUGHT})
    names = {name: [call["name"] for call in line["calls"]] for name, line in found.items() if line.get("calls")}
    assert names == {"call": ["weather"], "calls": ["read_file", "weather"]}
    calls = [*found["call"]["calls"], *found["calls"]["calls"]]
    assert len({call["id"] for call in calls}) == 3 and all(call["id"] for call in calls)
    for call in calls:
        jsonschema.validate(call["arguments"], PARAMETERS[call["name"]])
    ends = {"call": CALLED, "calls": CALLED, "stop": STOPPED, "title": CUT}
    odd = {
        name: found[name]["finish"]
        for name in (*NAMES, "long")
        if found[name]["finish"] not in ends.get(name, FINISHED)
    }
    assert odd == {}
    chat = [found[name] for name in NAMES if name != "title"]
    assert all(line["prompt"] > 1000 for line in chat)
    for before, line in itertools.pairwise(chat):
        assert before["prompt"] - 200 < line["cached"] < line["prompt"], line
    assert found["error"]["status"] == 400 and "temperature" in found["error"]["message"]
    assert found["error"].get("param", "temperature") == "temperature"
