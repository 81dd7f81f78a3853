"""Pictures and sound in requests of three protocols: the text of generate(), caches, refusals, and nothing opened."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import soundfile
import torch
from PIL import Image
from starlette.testclient import TestClient

import specdec
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config
from specdec.media.processor import Processor
from specdec.server import media
from tests.support.media.clips import tones
from tests.support.media.pictures import smooth
from tests.support.serving.process import serving
from tests.support.serving.served import USER, Served, events, listening, served, streamed_text

LIMITS: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
ASKED = {"type": "text", "text": "what is <|image|> this?"}


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png(height: int = 100, width: int = 150, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(smooth(height, width) + seed).save(file, "png")
    return file.getvalue()


def wav(samples: int = 8000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tones(samples)[:, 0], 16_000, format="wav")
    return file.getvalue()


CAT, CLIP = png(), wav()
CAT_URI = f"data:image/png;base64,{encoded(CAT)}"
CAT_PART = {"type": "image_url", "image_url": {"url": CAT_URI, "detail": "high"}}
CLIP_PART = {"type": "input_audio", "input_audio": {"data": encoded(CLIP), "format": "wav"}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_model(full_size_config("gemma-4-tiny"), None, folder)
    return folder


@pytest.fixture(scope="module")
def seeing(files: Path) -> Iterator[Served]:
    processor = specdec.load_processor(files)
    with served(files, drafter="suffix", max_sequences=2, processor=processor) as one:
        yield one


@pytest.fixture
def eyes(seeing: Served) -> Iterator[TestClient]:
    with seeing.client() as client:
        yield client


def generated_ids(seeing: Served, *content: Any, **options: Any) -> list[int]:
    """The tokens of `generate` with the processor. Its text must not have marks of media, and ours may."""
    model, processor = seeing.model, seeing.service.processor
    assert isinstance(processor, Processor)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": list(content)}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=12, **options)
    assert isinstance(output, torch.Tensor)
    return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]


def generated(seeing: Served, *content: Any, **options: Any) -> str:
    ids = generated_ids(seeing, *content, **options)
    return str(seeing.tokenizer.decode(ids, skip_special_tokens=True))


def ask(client: TestClient, *content: Any, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": list(content)}], **LIMITS, **more}
    done = client.post("/v1/chat/completions", json=body)
    assert done.status_code == 200, done.text
    return events(done.text) if more.get("stream") else done.json()


def text_of(reply: Any) -> str:
    return reply["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def test_the_text_is_that_of_generate_with_the_processor(
    seeing: Served, eyes: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, sound = {"type": "image", "image": CAT}, {"type": "audio", "audio": CLIP}
    question = {"type": "text", "text": "what?"}
    for given, sent in (
        ([picture, question], [CAT_PART, question]),
        ([question, sound], [question, CLIP_PART]),
        ([picture, question, sound, picture], [CAT_PART, question, CLIP_PART, CAT_PART]),
    ):
        expected = generated(seeing, *given)
        assert text_of(ask(eyes, *sent)) == expected
        assert streamed_text(ask(eyes, *sent, stream=True)) == expected
    sampled = {"temperature": 0.9, "seed": 3}
    expected = generated(seeing, picture, question, do_sample=True, top_k=0, **sampled)
    assert text_of(ask(eyes, CAT_PART, question, **sampled)) == expected
    never = [*seeing.service.defaults.suppress_tokens, *generated_ids(seeing, picture, question)]
    with monkeypatch.context() as patched:
        patched.setattr(seeing.service, "defaults", replace(seeing.service.defaults, suppress_tokens=never))
        without = text_of(ask(eyes, CAT_PART, question))
    assert without == generated(seeing, picture, question, suppress_tokens=never)
    assert without != generated(seeing, picture, question)
    answers = {text_of(ask(eyes, part, question)) for part in (CAT_PART, CLIP_PART, question)}
    assert len(answers) > 1, "what is shown and heard counts"
    listed = ask(eyes, CAT_PART, question, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert len(listed) == 12, "ids that the tokenizer does not have are listed too"


def test_three_protocols_through_their_clients(seeing: Served) -> None:
    expected = generated(seeing, {"type": "image", "image": CAT}, {"type": "text", "text": "what?"})
    user: Any
    with listening(seeing.app) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as gpt:
            user = {"role": "user", "content": [CAT_PART, {"type": "text", "text": "what?"}]}
            chat = gpt.chat.completions.create(model="any", messages=[user], **LIMITS)
            assert chat.choices[0].message.content == expected
            parts = [{"type": "input_image", "image_url": CAT_URI, "detail": "auto"}]
            user = {"role": "user", "content": [*parts, {"type": "input_text", "text": "what?"}]}
            response = gpt.responses.create(model="any", input=[user], temperature=0, max_output_tokens=12)
            assert response.output_text == expected
        with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as claude:
            source = {"type": "base64", "media_type": "image/png", "data": encoded(CAT)}
            user = {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]}
            more: Any = {"max_tokens": 12, "extra_body": {"temperature": 0}}
            message = claude.messages.create(model="any", messages=[user], **more)
            assert message.content[0].type == "text" and message.content[0].text == expected
            counted = claude.messages.count_tokens(model="any", messages=[user]).input_tokens
            assert chat.usage is not None and counted == chat.usage.prompt_tokens > 200


def test_a_picture_is_cached_by_what_it_shows(seeing: Served, eyes: TestClient) -> None:
    seeing.model.conversations.forget()

    def cached(*content: Any) -> tuple[int, int]:
        usage = ask(eyes, *content)["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    question, other = {"type": "text", "text": "what?"}, {"type": "text", "text": "who?"}
    prompt, none = cached(CAT_PART, question)
    assert none == 0
    assert cached(CAT_PART, question)[1] == prompt - 1
    _, shared = cached(CAT_PART, other)
    assert shared > prompt / 2, "the picture is read once"
    dog = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(png(seed=1))}"}}
    again, before = cached(dog, question)
    assert again == prompt and before <= 8, "all but what stands before the picture is read anew"
    newest = [*seeing.service.partings._newest][-1]
    assert newest.cached is not None and newest.cached <= newest.shared <= 8, "the view compares what pictures show"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_the_command_serves_them(files: Path, tmp_path: Path) -> None:
    with serving(files, tmp_path / "log") as (_, address):
        connection = http.client.HTTPConnection(address, timeout=60)
        body = {"messages": [{"role": "user", "content": [CAT_PART, CLIP_PART]}], "max_tokens": 1}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        done = json.loads(connection.getresponse().read())
        connection.close()
    assert done["usage"]["prompt_tokens"] > 200, done


def test_a_result_of_a_tool_may_be_a_picture(eyes: TestClient) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": encoded(CAT)}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [ASKED, {"type": "image", "source": source}]}
    turns = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    body = {"messages": turns, "max_tokens": 3, "tools": [{"name": "look", "input_schema": {"type": "object"}}]}
    done = eyes.post("/v1/messages", json=body)
    assert done.status_code == 200, done.text
    without = {**body, "messages": [*turns[:2], {"role": "user", "content": [{**result, "content": [ASKED]}]}]}
    counts = [eyes.post("/v1/messages/count_tokens", json=one).json()["input_tokens"] for one in (body, without)]
    assert counts[0] - counts[1] > 200
    items = [
        {"role": "user", "content": "look"},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": CAT_URI}]},
    ]
    done = eyes.post("/v1/responses", json={"input": items, "max_output_tokens": 3})
    assert done.status_code == 200 and done.json()["usage"]["input_tokens"] > 200


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "path": ({"type": "image_url", "image_url": {"url": "PATH"}}, "data URI"),
    "file": ({"type": "image_url", "image_url": {"url": "file://PATH"}}, "data URI"),
    "string": ({"type": "image_url", "image_url": "PATH"}, "data URI"),
    "web": ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:PORT/cat.png"}}, "data URI"),
    "our own name": ({"type": "image", "path": "PATH"}, "data URI"),
    "our own type": ({"type": "image", "image": "PATH", "where": "PATH"}, "data URI"),
    "no picture": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}, "PNG"),
    "no base64": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,***"}}, "damaged"),
    "nothing": ({"type": "image_url", "image_url": {}}, "data URI"),
    "number": ({"type": "image_url", "image_url": {"url": 7}}, "data URI"),
    "sound path": ({"type": "input_audio", "input_audio": {"data": "PATH", "format": "wav"}}, "damaged"),
    "sound url": ({"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:PORT/x.wav"}}, "data URI"),
    "no sound": ({"type": "input_audio", "input_audio": {"data": encoded(b"x" * 99), "format": "wav"}}, "sound"),
    "video": ({"type": "video_url", "video_url": {"url": "PATH"}}, "video_url"),
    "file id": ({"type": "input_file", "file_id": "PATH"}, "input_file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_part_is_named_and_nothing_is_opened(
    eyes: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    secret = tmp_path / "cat.png"
    secret.write_bytes(CAT)
    with socket.create_server(("127.0.0.1", 0)) as web:
        web.settimeout(0)
        part, reason = WRONG[name]
        sent = json.loads(json.dumps(part).replace("PATH", str(secret)).replace("PORT", str(web.getsockname()[1])))
        opened: list[str] = []
        real, path_open = os.open, Path.open

        def watch(path: Any, *rest: Any, **more: Any) -> Any:
            opened.append(str(path))
            return real(path, *rest, **more)

        def watch_path(path: Path, *rest: Any, **more: Any) -> Any:
            opened.append(str(path))
            return path_open(path, *rest, **more)

        with monkeypatch.context() as watched:
            watched.setattr(os, "open", watch)
            watched.setattr(Path, "open", watch_path)
            watched.setattr(Path, "exists", lambda path: opened.append(str(path)) or False)
            body = {"messages": [{"role": "user", "content": [ASKED, sent]}], **LIMITS}
            done = eyes.post("/v1/chat/completions", json=body)
        assert done.status_code == 400, done.text
        error = done.json()["error"]
        assert error["param"] == "messages[0].content[1]" and reason in error["message"], error
        assert str(secret) not in opened
        with pytest.raises(BlockingIOError):
            web.accept()
    source = {"type": "url", "url": str(secret)}
    block = {"role": "user", "content": [ASKED, {"type": "image", "source": source}]}
    refused = eyes.post("/v1/messages", json={"messages": [block], "max_tokens": 1})
    assert refused.status_code == 400 and "messages[0].content[1]" in refused.json()["error"]["message"]
    item = {"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}
    refused = eyes.post("/v1/responses", json={"input": [item]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "input[0].content[0]"


def test_a_model_of_text_names_the_part(client: TestClient) -> None:
    for part in (CAT_PART, CLIP_PART):
        body = {"messages": [USER, {"role": "user", "content": [ASKED, part]}], **LIMITS}
        done = client.post("/v1/chat/completions", json=body)
        assert done.status_code == 400, done.text
        error = done.json()["error"]
        assert error["param"] == "messages[1].content[1]" and "reads text alone" in error["message"]


def test_too_much_is_refused_before_it_is_read(
    eyes: TestClient, seeing: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = io.BytesIO()
    Image.new("1", (40_000, 20_000)).save(bomb, "png")  # 800 million pixels in 100 kB
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(bomb.getvalue())}"}}
    body = {"messages": [{"role": "user", "content": [ASKED, part]}], **LIMITS}
    done = eyes.post("/v1/chat/completions", json=body)
    assert done.status_code == 400 and done.json()["error"]["param"] == "messages[0].content[1]", done.text
    many = {"messages": [{"role": "user", "content": [CAT_PART] * (media.MOST + 1)}], **LIMITS}
    done = eyes.post("/v1/chat/completions", json=many)
    assert done.status_code == 400 and done.json()["error"]["param"] == f"messages[0].content[{media.MOST}]"
    monkeypatch.setattr(type(seeing.service), "context", 300)
    done = eyes.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [CAT_PART] * 9}]})
    assert done.status_code == 400 and done.json()["error"]["code"] == "context_length_exceeded"


def test_marks_of_media_in_a_text_are_text(seeing: Served, eyes: TestClient) -> None:
    plain = ask(eyes, ASKED)
    assert plain["usage"]["prompt_tokens"] < 100
    both = ask(eyes, ASKED, CAT_PART)
    assert both["usage"]["prompt_tokens"] > 200
    misplaced = {"role": "assistant", "content": [CAT_PART]}
    done = eyes.post("/v1/chat/completions", json={"messages": [USER, misplaced, USER], **LIMITS})
    assert done.status_code == 400 and done.json()["error"]["param"] == "messages[1].content"
