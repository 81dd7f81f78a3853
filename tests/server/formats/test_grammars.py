"""Answers under a constraint, by a model that says anything: calls fit the tools' schemas, content fits the format."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch

from specdec.engine.constraints import Constraint
from specdec.server.formats import ChatFormat, FieldError, Wanted, constraint_for, format_for
from specdec.server.formats.answer import AnswerParser
from tests.support.formats.tiny_chat import byte_tokenizer, gemma_tokenizer

SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object", "properties": {}},
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    {
        "type": "object",
        "properties": {
            "path": {"type": "string", "minLength": 1, "maxLength": 5, "description": "a path"},
            "Kind": {"enum": ["a", 'b"c', 1, None]},
            "lines": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
            "ratio": {"type": "number", "minimum": 0, "maximum": 9},
            "all": {"type": "boolean"},
            "x-y z": {"type": ["string", "null"]},
        },
        "required": ["path", "lines"],
    },
    {
        "type": "object",
        "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "n": {"$ref": "#/$defs/node"}}}},
        "properties": {"tree": {"$ref": "#/$defs/node"}, "any": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
        "required": ["tree"],
    },
    {"type": "object", "properties": {"o": {"type": "object", "additionalProperties": {"type": "integer"}}}},
    {"type": "object", "properties": {"d": {"type": "string", "format": "date"}, "p": {"pattern": "^[a-c]{2,3}$"}}},
    {"type": "object", "properties": {"uneven": {"type": "array", "uniqueItems": True}}, "required": ["uneven"]},
]  # fmt: skip


def formats() -> dict[str, ChatFormat]:
    return {
        "gemma4": format_for(gemma_tokenizer(), [1], 400),
        "qwen": format_for(byte_tokenizer(), [2], 300),
        "strings": format_for(byte_tokenizer(tags=False), [2], 300),
    }


@pytest.fixture(params=["gemma4", "qwen", "strings"])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return formats()[request.param]


def tool(name: str, schema: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def babble(chat: ChatFormat, constraint: Constraint, dice: random.Random, limit: int = 3000) -> list[int] | None:
    """An answer of random tokens that are allowed; what closes something is likelier. None: it did not end."""
    matcher = constraint.start()
    likely = {*chat.ends, *range(15)} | {chat.tokenizer.encode(c, add_special_tokens=False)[-1] for c in '"}],'}
    text: list[int] = []
    while len(text) < limit:
        forced = matcher.forced()
        allowed = torch.nonzero(matcher.allowed()).flatten().tolist()
        assert allowed, "a dead end"
        assert not forced or forced[0] in allowed
        closing = [token for token in allowed if token in likely]
        token = dice.choice(closing if closing and dice.random() < 0.5 else allowed)
        matcher.advance(token)
        text.append(token)
        if matcher.ended or token in chat.ends:
            return text
    return None


def said(
    chat: ChatFormat, body: dict[str, Any], dice: random.Random, prompt: Sequence[int] = ()
) -> tuple[str, list[tuple[str, Any]], AnswerParser, str]:
    """Content, calls, parser and reasoning of an answer that ended."""
    wanted = Wanted.of(body)
    constraint = constraint_for(chat, prompt, wanted)
    assert constraint is not None
    text = None
    while text is None:
        text = babble(chat, constraint, dice)
    parser = chat.parser(prompt, wanted.names, dice.random() < 0.5)
    deltas = [*parser.feed(text), *parser.finish()]
    calls: list[list[str]] = []
    for one in deltas:
        if one.tool_call is not None:
            if one.tool_call.id is not None:
                calls.append([str(one.tool_call.name), ""])
            calls[-1][1] += one.tool_call.arguments
    found = [(name, json.loads(arguments)) for name, arguments in calls]
    assert not parser.cut
    return "".join(d.content for d in deltas), found, parser, "".join(d.reasoning for d in deltas)


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_arguments_fit_the_schema(chat: ChatFormat, number: int) -> None:
    schema, dice = SCHEMAS[number], random.Random(number)
    for _ in range(8):
        content, calls, _, _ = said(chat, {"tools": [tool("look", schema)], "tool_choice": "required"}, dice)
        assert content == ""
        assert calls
        for name, arguments in calls:
            assert name == "look"
            jsonschema.validate(arguments, {key: value for key, value in schema.items() if number != 7})


def test_required_named_and_allowed_tools(chat: ChatFormat) -> None:
    dice = random.Random(1)
    tools = [tool("a", SCHEMAS[2]), tool("b", {"type": "object", "properties": {}}), tool("look-up.it", SCHEMAS[5])]
    names = {name for _ in range(25) for name, _ in said(chat, {"tools": tools, "tool_choice": "required"}, dice)[1]}
    assert names == {"a", "b", "look-up.it"}
    one = {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "b"}}}
    assert [said(chat, one, dice)[1] for _ in range(8)] == [[("b", {})]] * 8, "a tool that is named is called once"
    choice = {"mode": "required", "tools": [{"type": "function", "function": {"name": "b"}}]}
    some = {"tools": tools, "tool_choice": {"type": "allowed_tools", "allowed_tools": choice}}
    assert {name for name, _ in said(chat, some, dice)[1]} == {"b"}


def test_auto_and_one_call_at_most(chat: ChatFormat) -> None:
    dice = random.Random(2)
    counts = {True: set[int](), False: set[int]()}
    for parallel in (True, False):
        body = {"tools": [tool("f", SCHEMAS[1])], "parallel_tool_calls": parallel}
        for _ in range(60 if chat.name == "gemma4" else 25):
            counts[parallel].add(len(said(chat, body, dice)[1]))
    assert max(counts[False]) <= 1
    assert 0 in counts[True]
    if chat.ends != (2,) or "<tool_call>" in chat.tokenizer.get_vocab():
        assert max(counts[True]) > 1


def test_auto_under_way(chat: ChatFormat) -> None:
    """Free text may be anything, and a call that has begun is a call of the tool."""
    constraint = constraint_for(chat, (), Wanted.of({"tools": [tool("f", SCHEMAS[2])]}))
    assert constraint is not None
    open_ = "<|tool_call>" if chat.name == "gemma4" else "<tool_call>"
    head = "call:f{city:" if chat.name == "gemma4" else '\n{"name": "f", "arguments": {"city": "'
    ids = [*chat.tokenizer.encode(f'Hi! {{"a": <b> 漢\n{open_}', add_special_tokens=False)]
    matcher = constraint.start()
    assert matcher.valid([*ids, chat.ends[0]]) == len(ids), "no end after the opening of a call"
    for token in ids:
        matcher.advance(token)
    assert chat.tokenizer.decode(list(matcher.forced())).startswith(head)


def test_none_forbids_calls(chat: ChatFormat) -> None:
    body = {"tools": [tool("f", None)], "tool_choice": "none"}
    constraint = constraint_for(chat, (), Wanted.of(body))
    assert constraint is not None
    text = "Hi! 漢\n" + ("<|tool_call>" if chat.name == "gemma4" else "<tool_call>")
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    assert constraint.start().valid(ids) < len(ids)
    assert constraint.start().valid(ids[:-1]) == len(ids) - 1
    assert Wanted.of(body).names == []


def test_content_by_a_schema(chat: ChatFormat) -> None:
    dice = random.Random(4)
    for schema in (SCHEMAS[2], SCHEMAS[3], {"type": "array", "items": {"type": "integer"}, "maxItems": 3}):
        body = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        for _ in range(4):
            content, calls, _, _ = said(chat, body, dice)
            jsonschema.validate(json.loads(content), schema)
            assert calls == []
    content = said(chat, {"response_format": {"type": "json_object"}}, dice)[0]
    assert isinstance(json.loads(content), dict)


def test_a_schema_or_calls(chat: ChatFormat) -> None:
    dice = random.Random(5)
    body = {"response_format": {"type": "json_object"}, "tools": [tool("f", SCHEMAS[1])]}
    kinds = set()
    for _ in range(12):
        content, calls, _, _ = said(chat, body, dice)
        kinds.add(bool(calls))
        if calls:
            assert content == ""
        else:
            json.loads(content)
    assert True in kinds
    assert said(chat, {**body, "tool_choice": "required"}, dice)[1]


def test_a_thought_may_come_before_a_schema() -> None:
    dice = random.Random(6)
    body = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMAS[2]}}}
    for name, begun, silent in (
        ("gemma4", "<|turn>model\n<|channel>thought\n", "<|turn>model\n<|channel>thought\n<channel|>"),
        ("qwen", "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ):
        chat = formats()[name]
        prompt = chat.tokenizer.encode(begun, add_special_tokens=False)
        content, _, _, reasoning = said(chat, body, dice, prompt)
        jsonschema.validate(json.loads(content), SCHEMAS[2])
        assert reasoning
        prompt = chat.tokenizer.encode(silent, add_special_tokens=False)
        constraint = constraint_for(chat, prompt, Wanted.of(body))
        assert constraint is not None
        opening = chat.tokenizer.encode("{", add_special_tokens=False)
        assert constraint.start().valid(opening) == 1
    gemma = formats()["gemma4"]
    thinking = gemma.tokenizer.encode("<|turn>system\n<|think|>\n<turn|>\n<|turn>model\n", add_special_tokens=False)
    reasons = {bool(said(gemma, body, dice, thinking)[3]) for _ in range(12)}
    assert reasons == {True, False}


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "a" * 5000},
        {"properties": {"a": {"enum": ["x", -(2**63)]}}},
        {"const": {"a": [-1e19]}},
        {"properties": {"a": {"enum": ["x", "a" * 5000]}}},
        {"properties": {"a" * 5000: {}}},
        {"properties": {f"key{i}": {"type": "string", "description": "x" * 4000} for i in range(70)}},
    ],
)
def test_schemas_that_would_take_minutes_or_the_process_are_refused(schema: dict[str, Any]) -> None:
    wanted = Wanted.of({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}})
    with pytest.raises(FieldError, match=r"at most|be kept to") as caught:
        wanted.check()
    assert caught.value.param == "response_format.json_schema.schema"
    said = {"properties": {"a": {"description": "x" * 50_000, "type": "integer", "minimum": -(2**63)}}}
    Wanted.of({"tools": [{"type": "function", "function": {"name": "f", "parameters": said}}]}).check()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("", None)]}, "tools[0].function.name"),
        ({"tools": [tool("f", [])], "tool_choice": "x"}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f", None)], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [tool("f", None)], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_what_cannot_be_read_names_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(FieldError) as caught:
        Wanted.of(body)
    assert caught.value.param == param


def test_keywords_that_no_grammar_has(chat: ChatFormat) -> None:
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(FieldError, match="uniqueItems") as caught:
        constraint_for(chat, (), Wanted.of({"tools": [tool("g", None), tool("f", unique, strict=True)]}))
    assert caught.value.param == "tools[1].function.parameters"
    schema = {"type": "json_schema", "json_schema": {"schema": unique, "strict": True}}
    with pytest.raises(FieldError, match="uniqueItems") as caught:
        constraint_for(chat, (), Wanted.of({"response_format": schema}))
    assert caught.value.param == "response_format.json_schema.schema"


def test_a_tool_that_is_not_strict_is_never_refused(chat: ChatFormat) -> None:
    strange = {"type": "object", "properties": {"a": {"$ref": "http://elsewhere/x"}, "b": {"pattern": "(?=x)["}}}
    dice = random.Random(8)
    tools = [tool("f", strange), tool("g", SCHEMAS[2])]
    calls = [one for _ in range(12) for one in said(chat, {"tools": tools, "tool_choice": "required"}, dice)[1]]
    assert {name for name, _ in calls} == {"f", "g"}
    assert all("city" in arguments for name, arguments in calls if name == "g")


def test_nothing_wanted_is_no_constraint(chat: ChatFormat) -> None:
    for body in ({}, {"tools": [], "tool_choice": "none"}, {"tools": None}, {"response_format": {"type": "text"}}):
        assert constraint_for(chat, (), Wanted.of(body)) is None
