"""The grammar of whole answers: a thought, text, calls, JSON, in the order in which a format writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.server.formats.wanted import Wanted

# Room for any sensible indentation. Without a bound a model can write spaces for ever.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"


@dataclass(frozen=True)
class Shape:
    """Describe how a format writes the parts of an answer, as items of a Lark grammar.

    `between`: what stands between two calls. `thought`: the ids of its two tokens, and of those that it cannot have;
    None where no thought may come. `in_thought`: it has begun. `after_thought`: a terminal for what may stand between a
    thought and the rest. `text`: free text, up to a call; "" where a call's opening is a string, which ends free text
    itself.
    """

    call_open: str
    call_close: str
    between: str
    thought: tuple[int, int, tuple[int, ...]] | None
    in_thought: bool
    after_thought: str
    text: str


def answer_grammar(shape: Shape, calls: Sequence[tuple[str, str, str]], wanted: Wanted) -> str:
    """Return the rules of an answer. `calls`: text before the arguments, the rule of the arguments, text after, for
    each tool."""
    rules: list[str] = []
    more = f"({_quoted(shape.between)} call)*" if wanted.parallel else ""
    if calls:
        bodies = " | ".join(f"{_quoted(before)} {rule} {_quoted(after)}" for before, rule, after in calls)
        rules += [f"body: ({bodies}) {shape.call_close}", f"call: {shape.call_open} body"]
        rules.append(f"calls: call {more}")
    if wanted.schema is not None:
        guided = {"x-guidance": {"whitespace_pattern": WHITESPACE}, **wanted.schema}
        rules.append(f"json: %json {json.dumps(guided)}")
        answer = "json | calls" if calls and wanted.calls != "required" else "calls" if calls else "json"
    elif wanted.calls == "required":
        answer = "calls"
    elif shape.text:
        rules.append(f"text: {shape.text}")
        return "\n".join([f"start: text {'calls?' if calls else ''}", *rules, ""])
    else:
        rules += [r"TEXT: /(.|\n)*/", f"opened[lazy]: TEXT {shape.call_open}"]
        if calls:
            start = f"TEXT | opened body {more}"
        else:
            rules[-1] = rf"FREE: TEXT & ~/(?s:.*){json.loads(shape.call_open)}(?s:.*)/"
            start = "FREE"
        return "\n".join([f"start: {start}", *rules, ""])
    start = f"({answer})"
    if shape.thought is not None:
        opened, closed, without = shape.thought
        inner = f"<[^{','.join(map(str, (opened, closed, *without)))}]>* <[{closed}]> {shape.after_thought}"
        start = f"{inner} {start}" if shape.in_thought else f"(<[{opened}]> {inner})? {start}"
    return "\n".join([f"start: {start}", *rules, ""])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def compact(schema: dict[str, Any], strict: bool) -> dict[str, Any]:
    """Return the schema of a tool's arguments as a grammar takes it: spaces as `json.dumps` sets them, and no keys that
    it does not name, unless it asks for them."""
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": not strict}
    return {"x-guidance": options, **without_others({"type": "object", **schema})}


def without_others(schema: Any) -> Any:
    """Return `schema` without keys that nobody named."""
    if not isinstance(schema, dict) or {"anyOf", "oneOf", "allOf", "$ref", "if"} & {*schema}:
        return schema
    made = dict(schema)
    if isinstance(properties := schema.get("properties"), dict):
        made["properties"] = {key: without_others(one) for key, one in properties.items()}
        if "patternProperties" not in schema:
            made.setdefault("additionalProperties", False)
    if "items" in schema:
        made["items"] = without_others(schema["items"])
    return made
