"""The server on real text: the words of generate(), whoever else is served, whole characters, and a cache past the
window."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from specdec.drafting.suffix import PREDICTION
from specdec.server.generation.plain_text import PlainText
from tests.support.serving.served import Served, events, served, streamed_text

pytestmark = pytest.mark.model
ASKED = [{"role": "user", "content": "Write a short poem about rain with an emoji in every line. 雨はどこへ行く？"}]


@pytest.fixture(scope="module")
def real() -> Iterator[Served]:
    with served("smollm2-135m-instruct", max_sequences=3) as one:
        yield one


@pytest.fixture
def client(real: Served) -> Iterator[TestClient]:
    with real.client() as client:
        yield client


def ask(client: TestClient, **body: Any) -> Any:
    done = client.post("/v1/chat/completions", json={"messages": ASKED, "max_tokens": 60, **body})
    assert done.status_code == 200, done.text
    return events(done.text) if body.get("stream") else done.json()


@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.95, "seed": 5}])
def test_streamed_beside_others_and_drafted_it_is_the_text_of_generate(
    real: Served, client: TestClient, sampled: dict[str, Any]
) -> None:
    options = {name: value for name, value in sampled.items() if value}
    expected = real.generated(ASKED, max_new_tokens=60, speculation=False, **options)
    assert ask(client, **sampled)["choices"][0]["message"]["content"] == expected
    found: list[str] = [""] * 3

    def one(i: int) -> None:
        messages = ASKED if i == 1 else [{"role": "user", "content": f"Count to {90 + i}."}]
        found[i] = streamed_text(ask(client, messages=messages, stream=True, **sampled))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[1] == expected


def test_characters_of_several_tokens_come_whole(real: Served) -> None:
    text = "🌧️ naïve 雨 – ☔"
    ids = real.tokenizer(text)["input_ids"]
    assert len(ids) > len(text) / 2
    for step in (1, 2, 5):
        made = PlainText(real.tokenizer)
        deltas = [one for i in range(0, len(ids), step) for one in made.feed(ids[i : i + step])] + made.finish()
        assert "".join(one.content for one in deltas) == text
        assert not any("\ufffd" in one.content for one in deltas)
    cut = PlainText(real.tokenizer)
    assert [one.content for one in (*cut.feed(ids[:1]), *cut.finish())] == [real.tokenizer.decode(ids[:1])]


def test_a_title_beside_a_chat_and_the_next_turn_from_the_cache(real: Served, client: TestClient) -> None:
    chat = [{"role": "user", "content": "List the planets. " * 200}]
    first = ask(client, messages=chat, temperature=0, max_tokens=12)
    text = first["choices"][0]["message"]["content"]
    ask(client, messages=[{"role": "user", "content": "Give this chat a title: planets"}], max_tokens=4)
    chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "And moons?"}]
    usage = ask(client, messages=chat, temperature=0, max_tokens=4)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1


def test_a_prediction_of_an_edited_file(real: Served, client: TestClient) -> None:
    """Behaviour 16: most of a right prediction is accepted, whether the file stands in the prompt or not; none of it
    changes the text, and a wrong one is soon left alone."""
    file = "\n".join(f"timeout_{i} = {i * 7 % 90}" for i in range(200))
    asked = f"Rename timeout_0 to limit_0 and print the whole file.\n```python\n{file}\n```"
    new = 200
    for messages in ([{"role": "user", "content": asked}], ASKED):
        body = {"messages": messages, "temperature": 0, "max_tokens": new, "ignore_eos": True}
        text = ask(client, **body)["choices"][0]["message"]["content"]
        for guess in (text, text[: len(text) // 3] + " or not " + text[len(text) // 3 :], "all is well, and " * 300):
            before = real.service.engine.stats.draft_sources.get(PREDICTION, [0, 0])[0]
            again = ask(client, **body, prediction={"type": "content", "content": guess})
            assert again["choices"][0]["message"]["content"] == text
            details = again["usage"]["completion_tokens_details"]
            accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
            assert real.service.engine.stats.draft_sources.get(PREDICTION, [0, 0])[0] - before == accepted + rejected
            if guess.startswith("all"):
                assert rejected < 0.1 * new
            else:
                assert accepted > 0.5 * new and rejected < 0.2 * accepted
