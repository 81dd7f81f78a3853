"""Keyword arguments of the processor: each goes where it belongs, and an unknown one is an error that says where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from specdec.media.chat import template_variables
from specdec.media.processor import Processor
from tests.support.media.clips import moving
from tests.support.media.pictures import smooth
from tests.support.media.tokenizer import MEDIA_TEMPLATE, media_tokenizer

PICTURE = {"type": "image", "image": Image.fromarray(smooth(100, 150))}
VIDEO = {"type": "video", "video": moving(6)}
INPUTS: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(media_tokenizer(), MEDIA_TEMPLATE)


def chat(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"foo": 4}, "a processor takes no foo, and neither does the chat template[.]$"),
        ({"num_frame": 4}, "takes no num_frame, .*Did you mean num_frames"),
        ({"openin": "x"}, "takes no openin, .*Did you mean opening"),  # of the template
        ({"load_audio_from_videos": True}, "Did you mean load_audio_from_video[?]"),
        ({"images": []}, "images goes into the parts of the messages"),
        (
            {"processor_kwargs": {"load_audio_from_video": True}},
            "load_audio_from_video is an argument of apply_",
        ),
        ({"processor_kwargs": {"add_generation_prompt": True}}, "add_generation_prompt .*outside of processor_kwargs"),
        ({"processor_kwargs": {"text": "x"}}, "text goes into the parts of the messages"),
        ({"processor_kwargs": {"images_kwargs": {"num_frames": 3}}}, "images_kwargs takes no num_frames; .*videos_kw"),
        ({"processor_kwargs": {"images_kwargs": {"foo": 3}}}, "images_kwargs takes no foo[.]$"),
        ({"processor_kwargs": {"text_kwargs": {"images_kwargs": {}}}}, "pass images_kwargs beside it"),
        ({"processor_kwargs": "x"}, "processor_kwargs is a dict of arguments"),
        ({"return_assistant_tokens_mask": True}, "masks of an assistant's tokens are not made here"),
    ],
)
def test_an_argument_in_the_wrong_place_is_refused(
    processor: Processor, given: dict[str, Any], words: str, tokenize: bool
) -> None:
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(chat(PICTURE, VIDEO), tokenize=tokenize, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"foo": 4}, "a processor takes no foo[.]$"),
        ({"image": 4}, "Did you mean images"),
        ({"tokenize": True}, "tokenize is an argument of apply_chat_template"),
        ({"processor_kwargs": {}}, "processor_kwargs is an argument of apply_chat_template"),
    ],
)
def test_the_call_and_prepare_refuse_the_same(processor: Processor, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processor(text="hi", **given)
    with pytest.raises(ValueError, match=words):
        processor.prepare(PICTURE, **given)


def test_an_argument_of_the_call_may_stand_beside_those_of_the_template(processor: Processor) -> None:
    flat = processor.apply_chat_template(chat(VIDEO), num_frames=2, opening="so", add_generation_prompt=True, **INPUTS)
    nested = processor.apply_chat_template(
        chat(VIDEO), processor_kwargs={"num_frames": 2}, opening="so", add_generation_prompt=True, **INPUTS
    )
    assert flat["num_frames_per_video"].tolist() == [2] and torch.equal(flat["input_ids"], nested["input_ids"])
    assert processor.decode(flat["input_ids"][0]).endswith("so")
    assert processor.apply_chat_template(chat(), num_frames=2) == processor.apply_chat_template(chat())


def test_the_variables_of_a_template() -> None:
    assert {"messages", "opening", "add_generation_prompt"} <= template_variables(MEDIA_TEMPLATE)
    loop = "{% for m in messages %}{% if thinking %}{% continue %}{% endif %}"
    words = "{% generation %}{{ m['foo'] }}{% endgeneration %}{% endfor %}"
    assert template_variables(loop + words) == {"messages", "thinking"}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "imag", "path": "cat.png"}, "'imag' is no type of media; .*Did you mean image"),
        ({"type": "picture", "url": "cat.png"}, "'picture' is no type of media"),
        ({"type": "image", "file": "cat.png"}, 'a part of type "image" names no picture; write'),
    ],
)
def test_a_part_that_no_template_would_show_is_refused(processor: Processor, part: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(chat(part), **INPUTS)
    with pytest.raises(ValueError, match=words):
        processor.prepare(part)


def test_how_many_tokens_of_a_prompt_a_part_takes(processor: Processor) -> None:
    empty = processor.apply_chat_template(chat(), **INPUTS)["input_ids"].shape[1]
    for part in (PICTURE, VIDEO, {"type": "audio", "audio": [0.5] * 1281}):
        prepared = processor.prepare(part, num_frames=5)
        prompt = processor.apply_chat_template(chat(prepared), num_frames=5, **INPUTS)["input_ids"].shape[1]
        assert processor.count_tokens(prepared) == prompt - empty, part["type"]


def test_texts_of_the_pipeline_for_any_medium(processor: Processor) -> None:
    rows = processor(text=["hi", "what?"])["input_ids"]
    assert processor.post_process_multimodal_output(generated_outputs=rows) == ["hi", "what?"]
    assert processor.post_process_multimodal_output(rows, False, "text")[1].endswith("what?")
    with pytest.raises(ValueError, match="answers in text alone"):
        processor.post_process_multimodal_output(rows, generation_mode="audio")
