"""The processor: prompts with media as a model's inputs, and what it refuses."""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from specdec.media.processor import Processor
from specdec.media.settings import MediaSettings
from tests.support.media.clips import moving, tones, write_video
from tests.support.media.pictures import smooth
from tests.support.media.tokenizer import MEDIA_TEMPLATE, media_tokenizer

WIDE = Image.fromarray(smooth(100, 150))  # 60 soft tokens at 70, 273 at 280
TONE = tones(16_000, seconds=0.1)[:, 0]  # 1,600 samples: 3 soft tokens


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(media_tokenizer(), MEDIA_TEMPLATE)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def chat(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def inputs_of(processor: Processor, conversation: Any, **options: Any) -> Any:
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **options
    )


def test_a_picture_a_sound_and_a_video_in_one_message(processor: Processor) -> None:
    parts = (
        {"type": "image", "image": WIDE},
        " look ",
        {"type": "video", "video": moving(5, 64, 64)},
        {"type": "audio", "audio": TONE},
    )
    inputs = inputs_of(processor, chat(*parts), processor_kwargs={"images_kwargs": {"max_soft_tokens": 70}})
    frame = "<|image>" + "<|video|>" * 64 + "<image|>"
    video = " ".join(f"00:00 {frame}" for _ in range(5))
    image = "<|image>" + "<|image|>" * 60 + "<image|>"
    text = f"<bos><|turn>user\n{image}look{video}<|audio>{'<|audio|>' * 3}<audio|><turn|>\n<|turn>model\n"
    assert processor.decode(inputs["input_ids"][0]) == text
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    assert shapes == {
        "input_ids": ((1, length), torch.int64),
        "attention_mask": ((1, length), torch.int64),
        "mm_token_type_ids": ((1, length), torch.int64),
        "pixel_values": ((1, 70, 6912), torch.float32),
        "image_position_ids": ((1, 70, 2), torch.int64),
        "pixel_values_videos": ((5, 70, 6912), torch.float32),
        "video_position_ids": ((5, 70, 2), torch.int64),
        "num_frames_per_video": ((1,), torch.int64),
        "input_features": ((1, 3, 640), torch.float32),
        "input_features_mask": ((1, 3), torch.bool),
    }
    assert torch.bincount(inputs["mm_token_type_ids"][0]).tolist() == [length - 60 - 5 * 64 - 3, 60, 5 * 64, 3]
    assert {*inputs} <= {*processor.model_input_names}


def test_a_batch_is_padded_on_the_left_and_media_follow_the_texts(processor: Processor) -> None:
    other = Image.fromarray(smooth(150, 100))
    batch = [chat("hi"), chat({"type": "image", "image": WIDE}, "a"), chat("b", {"type": "image", "image": other})]
    inputs = inputs_of(processor, batch, processor_kwargs={"max_soft_tokens": 70})
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert inputs["input_ids"].shape[1] == max(lengths)
    alone = [inputs_of(processor, each, processor_kwargs={"max_soft_tokens": 70}) for each in batch]
    for row, length, each in zip(range(3), lengths, alone, strict=True):
        assert torch.equal(inputs["input_ids"][row, -length:], each["input_ids"][0])
        assert (
            not inputs["attention_mask"][row, :-length].any() and not inputs["mm_token_type_ids"][row, :-length].any()
        )
    assert torch.equal(inputs["pixel_values"], torch.cat([alone[1]["pixel_values"], alone[2]["pixel_values"]]))


def test_sounds_of_different_lengths_share_a_batch(processor: Processor) -> None:
    inputs = processor(text=["a<|audio|>", "<|audio|>b"], audio=[TONE, TONE[:641]], return_tensors="pt")
    assert inputs["input_features"].shape == (2, 3, 640)
    assert inputs["input_features_mask"].tolist() == [[True] * 3, [True, True, False]]
    assert not inputs["input_features"][1, 2].any()
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["a", "b"]


@pytest.mark.parametrize(
    "part",
    [
        lambda path: {"type": "image", "image": str(path)},
        lambda path: {"type": "image", "path": path},
        lambda path: {"type": "image", "url": str(path)},
        lambda path: {"type": "image", "image": path.read_bytes()},
        lambda path: {"type": "image", "base64": base64.b64encode(path.read_bytes()).decode()},
        lambda path: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(path)}"}},
        lambda path: {"type": "image_url", "image_url": f"data:image/png;base64,{b64(path)}"},
    ],
)
def test_the_ways_to_write_a_picture_in_a_message(processor: Processor, part: Any, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    path.write_bytes(png(WIDE))
    message = chat(part(path), "what?")
    before = copy.deepcopy(message)
    inputs = inputs_of(processor, message)
    assert torch.equal(
        inputs["pixel_values"], inputs_of(processor, chat({"type": "image", "image": WIDE}))["pixel_values"]
    )
    assert message == before  # the caller's


def b64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_the_ways_to_write_a_sound_in_a_message(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, TONE, 16_000, subtype="FLOAT")
    openai = {"type": "input_audio", "input_audio": {"data": b64(path), "format": "wav"}}
    for part in ({"type": "audio", "audio": TONE}, {"type": "audio", "path": path}, openai):
        inputs = inputs_of(processor, chat("hear", part))
        assert np.array_equal(inputs["input_features"].flatten()[:1600], TONE)


def test_a_video_by_number_or_rate_and_with_its_sound(processor: Processor, tmp_path: Path) -> None:
    sound = tones(48_000, seconds=3)[:, 0]
    path = write_video(tmp_path / "talk.mp4", moving(72), sound=sound)
    part = chat({"type": "video", "path": path}, "what is said?")
    usual = inputs_of(processor, part)
    assert usual["num_frames_per_video"].tolist() == [32] and "input_features" not in usual
    some = inputs_of(processor, part, processor_kwargs={"num_frames": 3, "return_metadata": True})
    assert list(some["video_metadata"][0].frames_indices) == [0, 24, 48]
    for given in ({"fps": 1}, {"videos_kwargs": {"fps": 1}}, {"num_frames": None, "fps": 1.0}):
        each_second = inputs_of(processor, part, processor_kwargs=given)
        assert torch.equal(each_second["pixel_values_videos"], some["pixel_values_videos"])
    assert processor.decode(some["input_ids"][0]).count("00:02 <|image>") == 1
    both = inputs_of(processor, part, load_audio_from_video=True, processor_kwargs={"num_frames": 3})
    assert both["input_features"].shape[1] == pytest.approx(75, abs=1)
    text = processor.decode(both["input_ids"][0])
    assert text.index("what is said?") < text.index("<|audio>")  # after the message's other parts
    apart = inputs_of(processor, chat({"type": "video", "path": path}, {"type": "audio", "path": path}))
    assert torch.equal(apart["input_features"], both["input_features"])


def test_the_sound_of_a_silent_video_is_left_out(processor: Processor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "silent.mp4", moving(4))
    for video in (path, moving(4)):
        inputs = inputs_of(processor, chat({"type": "video", "video": video}), load_audio_from_video=True)
        assert inputs["num_frames_per_video"].tolist() == [4] and "input_features" not in inputs


def test_frames_that_were_picked_before_keep_their_times(processor: Processor) -> None:
    metadata = {"total_num_frames": 3000, "fps": 25.0, "frames_indices": [0, 1500, 2999]}
    inputs = processor(
        text="<|video|>", videos=moving(3), do_sample_frames=False, video_metadata=[metadata], return_tensors="pt"
    )
    text = processor.decode(inputs["input_ids"][0])
    assert [text.count(f"{time} <|image>") for time in ("00:00", "01:00", "01:59")] == [1, 1, 1]
    given = VideoMetadata(total_num_frames=3, fps=1.0)
    timed = processor(text="<|video|>", videos=[[moving(3)]], video_metadata=[[given]], return_tensors="pt")
    assert "00:02 <|image>" in processor.decode(timed["input_ids"][0])


def test_a_medium_is_read_once_for_several_questions(processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(png(WIDE))
    soundfile.write(tmp_path / "tone.wav", TONE, 16_000)
    write_video(tmp_path / "talk.mp4", moving(9))
    parts = [{"type": kind, "path": tmp_path / name} for kind, name in
             (("image", "wide.png"), ("audio", "tone.wav"), ("video", "talk.mp4"))]  # fmt: skip
    options: dict[str, Any] = {"max_soft_tokens": 140, "num_frames": 3}
    expected = inputs_of(processor, chat(*parts, "what?"), processor_kwargs=options)
    prepared = [processor.prepare(part, **options) for part in parts]
    for path in tmp_path.iterdir():
        path.unlink()
    inputs = inputs_of(processor, chat(*prepared, "what?"), processor_kwargs=options)
    assert [*inputs] == [*expected] and all(torch.equal(inputs[name], expected[name]) for name in inputs)
    for number in (0, 2):
        with pytest.raises(ValueError, match="prepared for 140 soft tokens, and the call asks for 70"):
            inputs_of(processor, chat(prepared[number]), processor_kwargs={"max_soft_tokens": 70})
    with pytest.raises(ValueError, match="'text' is no type of media"):
        processor.prepare({"type": "text", "text": "a"})


def test_lists_of_pictures_paths_and_arrays_are_told_apart(processor: Processor, tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in moving(3)]
    paths = []
    for number, frame in enumerate(frames):
        paths.append(str(tmp_path / f"{number}.png"))
        frame.save(paths[-1])
    one = processor(text="<|video|>", videos=frames, return_tensors="pt")
    for given in ([frames], [[frames]], [moving(3)], moving(3)[None], [[paths]]):
        again = processor(text="<|video|>", videos=given, return_tensors="pt")
        assert torch.equal(again["pixel_values_videos"], one["pixel_values_videos"])
    pictures = processor(text="<|image|><|image|><|image|>", images=paths, max_soft_tokens=70, return_tensors="pt")
    assert pictures["image_position_ids"].shape == (3, 70, 2)
    two = processor(text="<|video|><|video|>", videos=[frames, frames[:2]])
    assert two["num_frames_per_video"] == [3, 2]
    in_a_part = inputs_of(processor, chat({"type": "video", "video": paths}))
    assert torch.equal(in_a_part["pixel_values_videos"], one["pixel_values_videos"])


def test_media_without_text(processor: Processor) -> None:
    inputs = processor(images=[[WIDE], [WIDE, WIDE]], max_soft_tokens=70)
    assert [row.count(processor.image_token_id) for row in inputs["input_ids"]] == [60, 120]
    assert [row.count(processor.audio_token_id) for row in processor(audio=[TONE, TONE])["input_ids"]] == [3, 3]


def test_settings_of_the_model_and_of_the_call() -> None:
    processor = Processor(media_tokenizer(), MEDIA_TEMPLATE, MediaSettings(image_tokens=140, num_frames=None, fps=2.0))
    assert processor(images=WIDE)["pixel_values"].shape == (1, 140, 6912)
    metadata = [{"total_num_frames": 50, "fps": 25.0}]
    assert processor(text="<|video|>", videos=moving(50), video_metadata=metadata)["num_frames_per_video"] == [4]
    assert processor(text="<|video|>", videos=moving(50), num_frames=7)["num_frames_per_video"] == [7]


def test_text_alone_and_the_template_s_own_arguments(processor: Processor) -> None:
    text = processor.apply_chat_template(chat("hi"), add_generation_prompt=True, opening="thought")
    assert text == "<bos><|turn>user\nhi<turn|>\n<|turn>model\nthought"
    assert processor.apply_chat_template([chat("a"), chat("b")])[1] == "<bos><|turn>user\nb<turn|>\n"
    assert processor.apply_chat_template(chat({"type": "image"})) == "<bos><|turn>user\n<|image|><turn|>\n"
    ids = processor.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True)
    assert processor.decode(ids[0]) == "<bos><|turn>user\nhi<turn|>\n"
    begun = [*chat("hi"), {"role": "assistant", "content": "well"}]
    assert processor.apply_chat_template(begun, continue_final_message=True).endswith("<|turn>model\nwell")
    assert processor(text="hi", padding="max_length", max_length=5)["attention_mask"] == [[0, 0, 0, 1, 1]]
    assert "mm_token_type_ids" not in processor(text="hi", text_kwargs={"return_mm_token_type_ids": False})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": "<|image|>"}, r"\[1\] places .* picture, and \[0\] are given"),
        ({"text": "no place", "images": WIDE}, r"\[0\] places .* and \[1\] are given"),
        ({"text": ["<|image|>", "x"], "images": [[], [WIDE]]}, r"\[1, 0\] places .* \[0, 1\] are given"),
        ({"text": "<|audio|>"}, "sound"),
        ({"text": "<|video|>"}, "video"),
        ({"text": "<|image|>", "images": WIDE, "max_soft_tokens": 256}, "one of 70, 140, 280, 560, 1120"),
        ({"text": "x", "max_soft_token": 70}, "max_soft_tokens"),
        ({"text": "x", "num_frames": 3, "fps": 1}, "leave one out"),
        ({"text": "x", "num_frames": 0}, "at least 1"),
        ({"text": "x", "num_frames": "8"}, "at least 1"),
        ({"text": "x", "num_frames": 2.5}, "at least 1"),
        ({"text": "x", "fps": -1}, "more than 0"),
        ({"text": "x", "fps": float("inf")}, "more than 0"),
        ({"text": "x", "fps": "1"}, "more than 0"),
        ({"text": "x", "max_soft_tokens": 280.0}, "one of 70"),
        ({"text": "x", "images_kwargs": 5}, "dict of arguments"),
        ({"text": 5}, "a list of strings"),
        ({"text": [None]}, "a list of strings"),
        ({"text": "x", "do_resize": False}, "do_resize is True"),
        ({"text": "x", "sampling_rate": 44_100}, "sampling_rate is 16000"),
        ({"text": "x", "max_length": 3, "text_kwargs": {"max_length": 4}}, "given twice"),
        ({"text": "<|audio|>", "audio": TONE, "truncation": True, "max_length": 3}, "cut inside its media"),
        ({"text": "<|video|>", "videos": moving(2), "video_metadata": [{}, {}]}, "describes 2 videos"),
        ({"text": "<|video|>", "videos": moving(2), "video_metadata": [{"total_num_frames": 90}]}, "correct it"),
        *(
            ({"text": "<|video|>", "videos": moving(2), "video_metadata": [given]}, "video_metadata")
            for given in (
                {"total_num_frames": 0},
                {"total_num_frames": None},
                {"total_num_frames": 2, "fps": 0},
                {"total_num_frames": 2, "frames_indices": [-1, "x"]},
                {"frames": 2},
                "two",
            )
        ),
        ({"text": "<|video|>", "videos": moving(2), "fps": 1}, "num_frames"),
        ({"text": "<|image|>", "images": "https://example.org/a.png"}, "download it"),
        ({}, "nothing to process"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(processor: Processor, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processor(**given)


def test_a_part_without_its_medium_is_refused(processor: Processor) -> None:
    with pytest.raises(ValueError, match='part of type "image" names no picture'):
        inputs_of(processor, chat({"type": "image"}))


@pytest.mark.parametrize("given", [None, [], 5, "hi", [5], ["hi"], [[]]])
def test_what_is_no_conversation_is_refused(processor: Processor, given: Any) -> None:
    with pytest.raises(ValueError, match="a conversation is a list of messages"):
        inputs_of(processor, given)


def test_a_model_without_template_or_without_tokens_for_media_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Processor(media_tokenizer()).apply_chat_template(chat("hi"))
    plain = media_tokenizer()
    plain.image_token = "<|picture|>"
    with pytest.raises(ValueError, match="reads text alone"):
        Processor(plain)
