"""What an answer's tokens mean: content, thoughts, calls; streamed, whole, cut, malformed, and at random."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest

from specdec.server.formats import ChatFormat, format_for
from specdec.server.formats.answer import AnswerParser, Style
from specdec.server.formats.base import Delta
from specdec.server.formats.chatml import JSONCall
from specdec.server.formats.gemma4.syntax import written
from specdec.server.formats.reader import Marks
from tests.support.formats.tiny_chat import byte_tokenizer, gemma_tokenizer

AWKWARD = "a \"quote\" {brace} [x], y:z\\ \n\t</tool_call> <|x|> é漢字🙂 'null' 1e5 "
VALUES: list[dict[str, Any]] = [
    {},
    {"city": "Paris"},
    {"text": AWKWARD},
    {"s": "1e5", "t": "null", "u": "true", "v": ""},
    {"n": 42, "f": -1.5, "e": 1e30, "b": True, "c": False, "x": None},
    {"o": {"k": {"deep": ["a", {"b": []}, [], [[1, 2], {}]]}}, "p": {}},
    {"a:b": 1, "": 2, "x y": 3, "{": 4, "é": "ü", " s": 5},
]
TOOLS = ["look", "f"]


def formats() -> dict[str, ChatFormat]:
    return {
        "gemma4": format_for(gemma_tokenizer(), [1], 400),
        "qwen": format_for(byte_tokenizer(), [2], 300),
        "strings": format_for(byte_tokenizer(tags=False), [2], 300),
    }


@pytest.fixture(params=["gemma4", "qwen", "strings"])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return formats()[request.param]


class Answer(NamedTuple):
    content: str
    reasoning: str
    calls: list[tuple[str, str]]
    deltas: list[Delta]


def collected(deltas: Iterable[Delta]) -> Answer:
    deltas = list(deltas)
    calls: list[list[str]] = []
    for one in deltas:
        assert bool(one.content) + bool(one.reasoning) + (one.tool_call is not None) == 1, "one field of each"
        if (call := one.tool_call) is not None:
            if call.id is not None:
                assert call.index == len(calls), "calls are numbered as they come"
                calls.append([str(call.name), ""])
            assert call.index == len(calls) - 1
            calls[-1][1] += call.arguments
    text = ("".join(one.content for one in deltas), "".join(one.reasoning for one in deltas))
    return Answer(*text, [(name, arguments) for name, arguments in calls], deltas)


def parsed(
    chat: ChatFormat, ids: Sequence[int], step: int = 1, stream: bool = True, prompt: Sequence[int] = (), **finish: bool
) -> Answer:
    parser = chat.parser(prompt, TOOLS, stream)
    deltas = [one for i in range(0, len(ids), step) for one in parser.feed(ids[i : i + step])]
    answer = collected([*deltas, *parser.finish(**finish)])
    assert parser.calls <= len(answer.calls)
    return answer


def thinks(chat: ChatFormat) -> bool:
    return bool({"<|channel>", "<think>"} & {*chat.tokenizer.get_vocab()})


def ids_of(chat: ChatFormat, text: str) -> list[int]:
    return list(chat.tokenizer.encode(text, add_special_tokens=False))


def call(chat: ChatFormat, name: str, arguments: dict[str, Any]) -> list[int]:
    """A call as the model writes it; a string of Gemma's is encoded by itself, so that its text stays text."""
    if chat.name != "gemma4":
        written_json = json.dumps(arguments, ensure_ascii=False)
        inside = f'\n{{"name": "{name}", "arguments": {written_json}}}\n'
        return [
            *ids_of(chat, "<tool_call>"),
            *ids_of(chat, inside.replace("</", "<\\/")),
            *ids_of(chat, "</tool_call>"),
        ]
    return ids_of(chat, f"<|tool_call>call:{name}{written(arguments)}<tool_call|>")


def thought(chat: ChatFormat, text: str) -> list[int]:
    return ids_of(
        chat, f"<|channel>thought\n{text}\n<channel|>" if chat.name == "gemma4" else f"<think>\n{text}\n</think>\n\n"
    )


def test_tokens_of_thoughts_are_counted(chat: ChatFormat) -> None:
    inside, content = thought(chat, "Let me < see 🙂") if thinks(chat) else [], ids_of(chat, "a < b <tool")
    parser = chat.parser((), TOOLS)
    parser.feed([*content, *inside, *content, *call(chat, "look", {"a": 1}), *inside])
    expected = 2 * len(inside) - (
        0 if chat.name == "gemma4" else 4
    )  # the line breaks after a tag are not the thought's
    assert parser.thoughts == (expected if inside else 0)
    begun = chat.parser((), TOOLS)
    begun.feed(inside[:-9])
    begun.finish(by_length=True)
    assert begun.thoughts == len(inside[:-9])


def test_a_tag_of_several_tokens_belongs_to_its_thought() -> None:
    chat = formats()["strings"]
    marks = Marks(chat.tokenizer, {"<think>": "<think>", "</think>": "</think>"})
    style = Style("<think>", "</think>", "<call>", "</call>", "", True, JSONCall)
    parser = AnswerParser(marks.reader(), style, False, ())
    parser.feed(ids_of(chat, "x<thin<think>because</thi</think>so <t"))
    parser.finish()
    assert parser.thoughts == len("<think>because</thi</think>")


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_thought_content_and_calls(chat: ChatFormat, step: int, stream: bool) -> None:
    ids = thought(chat, "Let me\n\nsee 🙂") if thinks(chat) else []
    ids += ids_of(chat, "Voilà, 漢字🙂\n") + [one for value in VALUES for one in call(chat, "look", value)]
    answer = parsed(chat, [*ids, chat.ends[0]], step, stream)
    assert answer.reasoning == ("Let me\n\nsee 🙂" if thinks(chat) else "")
    assert answer.content == "Voilà, 漢字🙂"
    assert [name for name, _ in answer.calls] == ["look"] * len(VALUES)
    assert [json.loads(arguments) for _, arguments in answer.calls] == VALUES
    if stream and step == 1:
        assert len(answer.deltas) > 100, "arguments come as they are written"
    first = [one.tool_call for one in answer.deltas if one.tool_call and one.tool_call.id]
    assert len({one.id for one in first}) == len(VALUES)


def test_a_thought_that_the_prompt_began(chat: ChatFormat) -> None:
    if not thinks(chat):
        return
    begun = (
        thought(chat, "x")[: len(ids_of(chat, "<|channel>thought\n"))]
        if chat.name == "gemma4"
        else ids_of(chat, "<think>\n")
    )
    close = "<channel|>" if chat.name == "gemma4" else "</think>\n\n"
    answer = parsed(chat, ids_of(chat, f"so it is\n{close}Yes."), prompt=begun)
    assert (answer.reasoning, answer.content) == ("so it is", "Yes.")
    assert parsed(chat, ids_of(chat, "Yes."), prompt=[*begun, *ids_of(chat, close)]).content == "Yes."


def test_an_empty_thought_is_none(chat: ChatFormat) -> None:
    empty = "<|channel>thought\n<channel|>" if chat.name == "gemma4" else "<think>\n\n</think>\n\n"
    if thinks(chat):
        assert parsed(chat, ids_of(chat, f"{empty}Yes.")).deltas == [
            Delta(content="Y"),
            *map(lambda c: Delta(content=c), "es."),
        ]


def test_line_breaks_of_plain_content_stay(chat: ChatFormat) -> None:
    text = "\n\na\n\n\nb  \n\n"
    for step in (1, 2, 100):
        assert parsed(chat, ids_of(chat, text), step).content == text


def test_characters_are_whole(chat: ChatFormat) -> None:
    ids = ids_of(chat, "é漢🙂")
    deltas = [chat.parser(()).feed([one]) for one in ids[:1]]
    assert deltas == [[]]
    parser = chat.parser(())
    texts = [delta.content for one in ids for delta in parser.feed([one])]
    assert texts == ["é", "漢", "🙂"]
    assert parsed(chat, ids[:-1]).content == "é漢\ufffd", "bytes that make no character"


@pytest.mark.parametrize(
    ("written", "shown"),
    [("so <tool", "so "), ("so <to", "so "), ("so <t", "so <t"), ("so <tab", "so <tab"), ("so <", "so <")],
)
def test_half_a_mark_cut_by_the_limit_is_no_content(written: str, shown: str) -> None:
    chat = formats()["strings"]
    parser = chat.parser((), TOOLS)
    deltas = [*parser.feed(ids_of(chat, written)), *parser.finish(by_length=True)]
    assert (collected(deltas).content, parser.cut) == (shown, written != shown)
    assert parsed(chat, ids_of(chat, written)).content == written, "the model itself ended there"
    without = chat.parser((), ())
    deltas = [*without.feed(ids_of(chat, written)), *without.finish(by_length=True)]
    assert collected(deltas).content == written, "nothing can be called"


def test_a_call_cut_by_the_limit_is_no_call_and_no_content(chat: ChatFormat) -> None:
    ids = call(chat, "look", {"text": "abc", "n": 1})
    for end in range(len(ids_of(chat, "<tool_call>" if chat.name == "chatml" else "<|tool_call>")), len(ids)):
        parser = chat.parser((), TOOLS, stream_calls=False)
        deltas = [*parser.feed(ids[:end]), *parser.finish(by_length=True)]
        answer = collected(deltas)
        if answer.calls:  # the last mark alone is missing
            assert json.loads(answer.calls[0][1]) == {"text": "abc", "n": 1}
        else:
            assert (answer.content, parser.cut, parser.calls) == ("", True, 0)


@pytest.mark.parametrize(
    "inside",
    [
        "hello", "", "call:look", "call:look{", "call:look{a}", "call:look{a:}", "call:look{a:1,}", "call:look{a:1]",
        "call:look{a:[1}", "call:look{a:nul}", "call:look{a:01}", "call:look{a:1}}", "call:unknown{}", "{}", "[]",
        '{"name": "look"}', '{"name": "look", "arguments": 1}', '{"name": "look", "arguments": {}} x',
        '{"name": 1, "arguments": {}}', '{"name": "unknown", "arguments": {}}', '{"name": "look", "arguments": {]}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("closed", [True, False])
def test_what_is_malformed_is_content(chat: ChatFormat, inside: str, closed: bool) -> None:
    open_, close = ("<|tool_call>", "<tool_call|>") if chat.name == "gemma4" else ("<tool_call>", "</tool_call>")
    ids = ids_of(chat, f"So: {open_}{inside}{close if closed else ''}")
    answer = parsed(chat, ids, stream=False)
    assert answer.calls == []
    assert inside in answer.content
    assert answer.content.startswith("So: ")
    if chat.name == "gemma4":
        assert "tool_call" not in answer.content, "special tokens are no content"


def test_after_something_malformed_all_goes_on(chat: ChatFormat) -> None:
    open_ = "<|tool_call>" if chat.name == "gemma4" else "<tool_call>"
    ids = [*ids_of(chat, f"{open_}what? "), *call(chat, "f", {"a": 1}), *ids_of(chat, "end")]
    answer = parsed(chat, ids, stream=False)
    assert answer.calls == [("f", answer.calls[0][1])]
    assert "what? " in answer.content
    assert answer.content.endswith("end")


def test_calls_to_tools_that_nobody_offered_are_content(chat: ChatFormat) -> None:
    parser = chat.parser((), ())
    answer = collected([*parser.feed(call(chat, "look", {"a": 1})), *parser.finish()])
    assert answer.calls == []
    assert "look" in answer.content


def test_a_list_of_calls_between_tags() -> None:
    chat = formats()["strings"]
    found = '[{"name": "look", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]'
    answer = parsed(chat, ids_of(chat, f"<tool_call>{found}</tool_call>"), stream=False)
    assert answer.calls == [("look", '{"a": 1}'), ("f", "{}")]


@pytest.mark.parametrize("stream", [True, False])
def test_no_sequence_of_tokens_is_an_error(chat: ChatFormat, stream: bool) -> None:
    dice = random.Random(7)
    vocabulary = len(chat.tokenizer)
    marks = [*range(15)]
    valid = [*call(chat, "look", VALUES[2]), *call(chat, "f", VALUES[5]), *thought(chat, "hm")]
    for _ in range(150):
        ids = list(valid[dice.randrange(20) :]) if dice.random() < 0.7 else []
        for _ in range(dice.randrange(1, 12)):
            at = dice.randrange(len(ids) + 1)
            strange = [dice.choice(marks) if dice.random() < 0.5 else dice.randrange(-1, vocabulary + 3)]
            ids[at : at + dice.randrange(3)] = strange * dice.randrange(1, 3)
        answer = parsed(chat, ids, dice.randrange(1, 40), stream, by_length=dice.random() < 0.3)
        if not stream:
            assert all(isinstance(json.loads(arguments), dict) for _, arguments in answer.calls)
        again = parsed(chat, ids, 1, stream)
        if answer.content == again.content:
            assert [name for name, _ in answer.calls] == [name for name, _ in again.calls]


def test_pieces_add_up_whatever_the_steps(chat: ChatFormat) -> None:
    dice = random.Random(3)
    for _ in range(60):
        ids = [dice.randrange(len(chat.tokenizer)) for _ in range(60)]
        whole = parsed(chat, ids, 1000)
        for step in (1, 7):
            assert parsed(chat, ids, step)[:3] == whole[:3]
