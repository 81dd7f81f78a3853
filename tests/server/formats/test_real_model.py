"""Fifty calls by SmolLM2: each fits its tool's schema, and drafts change none of them."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

import specdec
from specdec.drafting.protocol import Drafter, DraftLength, FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.constraints import FORCED
from specdec.engine.engine import Engine
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.server.formats import Wanted, constraint_for, format_for
from tests.support.decoding import to_end

CALLS, NEW = 50, 60
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                },
                "required": ["city", "unit"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "set_alarm",
            "parameters": {
                "type": "object",
                "properties": {
                    "time": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
                    "repeat": {"type": "array", "items": {"enum": ["mon", "tue", "wed"]}, "maxItems": 3},
                },
                "required": ["time"],
            },
        },
    },
]
SCHEMAS = {
    tool["function"]["name"]: {**tool["function"]["parameters"], "additionalProperties": False} for tool in TOOLS
}
PLACES = ["Paris", "Oslo", "Lima", "Cairo", "Kyoto"]


@pytest.mark.model
def test_fifty_calls_fit_their_schemas_drafted_as_plain() -> None:
    model = specdec.load("smollm2-135m-instruct", drafter=None)
    tokenizer = specdec.load_tokenizer("smollm2-135m-instruct")
    eos = model.generation_config.eos_token_id
    chat = format_for(tokenizer, [eos] if isinstance(eos, int) else eos, model.decoder.spec.vocab_size)
    assert chat.name == "chatml"
    wanted = Wanted.of({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False})

    def ask(number: int) -> Request:
        asked = f"The weather in {PLACES[number % 5]}?" if number % 2 else f"Wake me at {number % 12 + 1}."
        prompt = chat.prompt([{"role": "user", "content": asked}], TOOLS, {})
        row = torch.tensor(prompt, dtype=torch.int64)
        sampler = Sampler() if number < 10 else Sampler.at_temperature(0.8, number)
        constraint = constraint_for(chat, prompt, wanted)

        def stop(tokens: torch.Tensor, choice: Choice) -> bool:
            return choice.token in chat.ends

        return Request(row, len(row) + NEW, sampler, stop, constraint=constraint)

    def answers(drafter: Drafter, lengths: DraftLength, stats: GenerationStats) -> list[list[int]]:
        engine = Engine(model.decoder, drafter, lengths, model.conversations, 4, stats)
        sequences = [engine.add(ask(0))]
        to_end(engine)  # the others go on from its system message
        sequences += [engine.add(ask(number)) for number in range(1, CALLS)]
        to_end(engine)
        assert {sequence.finish for sequence in sequences} <= {"stop", "length"}
        return [sequence.row[len(sequence.request.row) :].tolist() for sequence in sequences]

    plain = answers(NoDraft(), FixedLength(0), GenerationStats())
    stats = GenerationStats()
    assert answers(SuffixDrafter(), FixedLength(6), stats) == plain
    assert stats.draft_sources[FORCED][1] > 5 * CALLS
    assert stats.rounds < sum(map(len, plain)) * 0.7
    ended = 0
    for text in plain:
        parser = chat.parser((), wanted.names)
        deltas = [*parser.feed(text), *parser.finish(by_length=len(text) == NEW)]
        calls = [delta.tool_call for delta in deltas if delta.tool_call]
        assert not any(delta.content for delta in deltas)
        if parser.cut:
            assert len(text) == NEW
            continue
        ended += 1
        jsonschema.validate(json.loads("".join(call.arguments for call in calls)), SCHEMAS[str(calls[0].name)])
    assert ended > 0.9 * CALLS
