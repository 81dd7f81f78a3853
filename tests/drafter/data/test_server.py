"""Answers of a server: the texts that the backbone itself would have written, and what is wrong with a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from drafter.data.answering import generate_answers
from drafter.data.features import longest_text
from drafter.data.given import EncodedPrompt, read_given
from drafter.data.patience import PATIENT, Patience
from drafter.data.server import AnswerServer, Reply, ServerAnswers
from drafter.prompts.files import TrainingPrompt
from drafter.settings import Answering
from eval.cli.options import GenerationSettings
from eval.cli.session import Session
from eval.train.texts import completed, ends_of, messages_of
from tests.support.serving.served import listening, served

HOW = Answering(max_new_tokens=24, temperatures=(0.0, 0.8), seed=3)
PROMPTS = ["Name three rivers.", "What is 2 + 2?", "Write Python that prints hello.", "List the days of the week."]


def asked(text: str) -> TrainingPrompt:
    return TrainingPrompt("user", (("user", text),))


@pytest.mark.model
def test_answers_of_a_server_are_read_as_the_backbones_own() -> None:
    with served("smollm2-135m-instruct", drafter="none", max_sequences=3) as one, listening(one.app) as address:
        session = Session(one.model, one.tokenizer, GenerationSettings("smollm2-135m-instruct"))
        backbone = one.model.decoder
        layers = [backbone.spec.shared_kv_layers["full_attention"]]
        prompts = [EncodedPrompt(asked(text), session.encode(messages_of(asked(text)))[0]) for text in PROMPTS]
        server = AnswerServer(address)
        assert server.model == "tiny"
        answers = ServerAnswers(server, lambda: iter(prompts), partial(completed, session), HOW, together=3)
        read = dict(read_given(backbone, answers(0, PATIENT), layers=layers, workers=2, dtype=torch.float32))
        own = dict(
            generate_answers(
                backbone,
                [prompt.ids for prompt in prompts],
                layers=layers,
                max_new_tokens=HOW.max_new_tokens,
                eos_ids=ends_of(session),
                temperatures=HOW.temperatures,
                seed=HOW.seed,
                dtype=torch.float32,
            )
        )
        assert (answers.used, answers.left_out, sorted(read)) == (4, 0, [0, 1, 2, 3])
        for number, text in own.items():
            found = read[number]
            assert torch.equal(found.tokens, text.tokens) and found.answer == text.answer, PROMPTS[number]
            assert torch.equal(found.hidden, text.hidden) and torch.equal(found.best, text.best)
            for layer in layers:
                pairs = zip(found.keys[layer], text.keys[layer], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
        assert sorted(number for number, _ in answers(2, PATIENT)) == [2, 3], "it goes on from any prompt"
        over = Patience(until=0.0, now=lambda: 1.0)
        assert list(answers(0, over)) == []
        assert longest_text(backbone, layers) > 24


def complete(prompt: EncodedPrompt, reply: Reply) -> torch.Tensor | None:
    return torch.cat((prompt.ids, torch.tensor([7, 8]))) if reply.text == "good" else None


@contextmanager
def answering(*replies: Response, models: Any = ("m",)) -> Iterator[tuple[str, list[Any]]]:
    """A server that sends `replies` one after the other, the last one for ever, and keeps what it is asked."""
    coming, bodies = iter(replies), list[Any]()
    last: Response | None = None

    async def chat(request: Request) -> Response:
        nonlocal last
        bodies.append((await request.json(), request.headers.get("authorization")))
        last = next(coming, last)
        assert last is not None
        return last

    async def listed(request: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in models]})

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", listed)])
    with listening(app) as address:
        yield address, bodies


def said(text: str | None, finish: str = "stop") -> Response:
    return JSONResponse({"choices": [{"message": {"content": text}, "finish_reason": finish}]})


def endless() -> Iterator[EncodedPrompt]:
    return (EncodedPrompt(asked(f"prompt {i}"), torch.tensor([1, 2, i])) for i in count())


def test_what_is_asked_and_what_an_answer_of_no_use_becomes() -> None:
    refused = JSONResponse({"error": {"message": "too long"}}, 400)
    with answering(said("good"), refused, said(None), said("bad"), said("good", "length")) as (address, bodies):
        server = AnswerServer(address + "/v1/", "m", "secret")
        answers = ServerAnswers(server, endless, complete, HOW, together=1)
        texts = answers(10, PATIENT)
        found = [next(texts) for _ in range(5)]
        texts.close()
    assert [number for number, _ in found] == [10, 11, 12, 13, 14]
    assert [text.tokens.tolist()[2:] for _, text in found] == [[10, 7, 8], [11], [12], [13], [14, 7, 8]]
    assert all(text.answer == 3 for _, text in found)
    body, key = bodies[1]
    assert key == "Bearer secret"
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "prompt 11"}], "max_tokens": 24, "temperature": 0.8,
        "seed": 14, "stream": False,
    }  # fmt: skip


def test_a_server_without_room_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafter.data.server._WAITS", (0.01, 0.01))
    busy = JSONResponse({"error": {}}, 429)
    with answering(busy, JSONResponse({}, 503), said("good"), busy) as (address, bodies):
        server = AnswerServer(address)
        assert server.ask(asked("x"), 5, 0.0, 0) == Reply("good", True)
        assert len(bodies) == 3
        with pytest.raises(ValueError, match="status 429"):
            server.ask(asked("x"), 5, 0.0, 0)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (PlainTextResponse("<html>", 200), "no JSON object came"),
        (JSONResponse({"choices": []}), "without choices"),
        (JSONResponse({"choices": [{"message": None}]}), "without choices"),
        (JSONResponse({"detail": "no"}, 401), "OPENAI_API_KEY"),
        (JSONResponse({}, 500), "status 500"),
    ],
)
def test_a_server_that_answers_otherwise(reply: Response, why: str) -> None:
    with answering(reply) as (address, _):
        answers = ServerAnswers(AnswerServer(address), endless, complete, HOW, together=2)
        with pytest.raises(ValueError, match=why):
            list(answers(0, PATIENT))


def test_a_server_that_has_another_model() -> None:
    with answering(said("words of another model")) as (address, _):
        answers = ServerAnswers(AnswerServer(address), endless, complete, HOW, together=2)
        with pytest.raises(ValueError, match=r"answers of 'm' .* are of no use.*the same model"):
            list(answers(0, PATIENT))
        with pytest.raises(ValueError, match="no model 'other'; it has m"):
            AnswerServer(address, "other")
    with answering(said("good"), models=()) as (address, _), pytest.raises(ValueError, match="lists no model"):
        AnswerServer(address)
    with pytest.raises(ValueError, match=r"nothing answers at http://127\.0\.0\.1:9/v1"):
        AnswerServer("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="nothing answers at"):
        AnswerServer("no url at all")
