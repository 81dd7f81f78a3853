"""The same inputs as transformers' own processor, side by side, where torchvision is there (`.ci/run` brings it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.media.operators import HAS_TORCHVISION

if not HAS_TORCHVISION:
    pytest.skip("needs torchvision; tests/support/media/operators.py says how to get it", allow_module_level=True)

from specdec.media.pictures import BUDGETS, cut_patches, read_pixels, stack_patches
from specdec.media.processor import Processor
from tests.support.media.clips import moving, tones, write_video
from tests.support.media.conversations import conversations
from tests.support.media.pictures import exif_rotated, noise, smooth
from tests.support.media.reference import all_pictures, image_processor, transformers_processor
from tests.support.media.tokenizer import MEDIA_TEMPLATE, media_tokenizer

ARRAYS = {
    "last": noise(33, 44, 3),
    "first": noise(3, 33, 44),
    "one channel": noise(1, 33, 44),
    "RGBA": noise(33, 44, 4),
    "RGBA first": noise(4, 33, 44),
    "tensor": torch.from_numpy(noise(3, 100, 50)),
    "0 to 1": noise(30, 40, 3).astype(np.float32) / 255,
    "RGBA, 0 to 1": noise(30, 40, 4).astype(np.float32) / 255,
    "int64": noise(30, 40, 3).astype(np.int64),
    "int16": noise(30, 40, 3).astype(np.int16),
    "mirrored": noise(30, 40, 3)[:, ::-1],
}


@pytest.fixture(scope="module")
def both() -> tuple[Any, Processor]:
    return transformers_processor(), Processor(media_tokenizer(), MEDIA_TEMPLATE)


def compare(theirs: Any, ours: Any) -> None:
    assert [*theirs] == [*ours]
    for name, value in theirs.items():
        assert type(value) is type(ours[name]), name
        if isinstance(value, torch.Tensor):
            assert value.dtype == ours[name].dtype and torch.equal(value, ours[name]), name
        elif isinstance(value, np.ndarray):
            assert value.dtype == ours[name].dtype and np.array_equal(value, ours[name]), name
        else:
            assert value == ours[name], name


@pytest.mark.parametrize("name", [*all_pictures(), *ARRAYS])
def test_pictures(name: str) -> None:
    picture, theirs = {**all_pictures(), **ARRAYS}[name], image_processor()
    for budget in BUDGETS:
        expected = theirs(np.ascontiguousarray(picture) if name == "mirrored" else picture, max_soft_tokens=budget)
        cut = cut_patches(read_pixels(picture), budget)
        stacked = stack_patches([cut], budget)
        assert torch.equal(expected["pixel_values"].to(torch.float32), stacked.values)
        assert torch.equal(expected["image_position_ids"], stacked.positions)
        assert expected["num_soft_tokens_per_image"] == [len(cut.values)]


@pytest.mark.parametrize("orientation", [1, 6])
def test_pictures_in_files(orientation: int, tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    path = exif_rotated(tmp_path / "turned.jpg", orientation)
    expected = image_processor()(load_image(str(path)), max_soft_tokens=70)
    assert torch.equal(expected["pixel_values"], stack_patches([cut_patches(read_pixels(path), 70)], 70).values)


@pytest.mark.parametrize("name", conversations())
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_conversations(both: tuple[Any, Processor], name: str, tensors: str | None) -> None:
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    if tensors is not None or name != "batch":
        options["return_tensors"] = tensors
    theirs, ours = (processor.apply_chat_template(conversations()[name], **options) for processor in both)
    compare(theirs, ours)


@pytest.mark.parametrize(
    "given",
    [
        {"max_soft_tokens": 140},
        {"images_kwargs": {"max_soft_tokens": 1120}},
        {"videos_kwargs": {"num_frames": 5, "max_soft_tokens": 140}},
        {"num_frames": 40},
        {"do_sample_frames": False},
        {"text_kwargs": {"padding": "max_length", "max_length": 3500}},
        {"text_kwargs": {"return_mm_token_type_ids": False}},
        {"add_special_tokens": True},
    ],
)
def test_arguments_of_a_call(both: tuple[Any, Processor], given: dict[str, Any]) -> None:
    conversation = conversations()["all"]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs, ours = (
        processor.apply_chat_template(conversation, processor_kwargs=dict(given), **options) for processor in both
    )
    compare(theirs, ours)


def test_calls_without_a_template(both: tuple[Any, Processor]) -> None:
    image = Image.fromarray(smooth(90, 140))
    sound = tones(16_000)[:, 0]
    for given in (
        {"images": image, "text": "<|image|> a"},
        {"images": [image, image], "text": "<|image|> a <|image|>"},
        {"images": [[image], [image, image]], "text": ["<|image|> a", "<|image|><|image|>"]},
        {"images": [[image], [image, image]]},
        {"audio": [sound, sound[:700]]},
        {"audio": sound, "text": "<|audio|>"},
        {"videos": [moving(32), moving(40)], "text": "<|video|> and <|video|>"},
        {"videos": list(map(Image.fromarray, moving(33))), "text": "<|video|>"},
    ):
        for tensors in ("pt", None) if "text" in given or "audio" not in given else (None,):
            theirs, ours = (processor(**given, padding=True, return_tensors=tensors) for processor in both)
            compare(theirs, ours)


@pytest.mark.parametrize("frames", [3, 32])
def test_a_file_of_video(both: tuple[Any, Processor], frames: int, tmp_path: Path) -> None:
    from transformers.video_utils import load_video

    path = write_video(tmp_path / "clip.mp4", moving(60, 64, 96), rate=10)
    decoded, metadata = load_video(str(path), num_frames=frames)
    theirs = both[0](
        text="see <|video|>", videos=decoded, video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    ours = both[1](text="see <|video|>", videos=path, num_frames=frames, return_tensors="pt")
    compare(theirs, ours)


def test_grey_frames(both: tuple[Any, Processor]) -> None:
    theirs, ours = (processor(text="<|video|>", videos=moving(32)[..., :1], return_tensors="pt") for processor in both)
    compare(theirs, ours)


def test_transformers_opens_what_we_save(both: tuple[Any, Processor], tmp_path: Path) -> None:
    from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor

    both[1].save_pretrained(tmp_path)
    opened = Gemma4UnifiedProcessor.from_pretrained(tmp_path)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    compare(
        opened.apply_chat_template(conversations()["all"], **options),
        both[1].apply_chat_template(conversations()["all"], **options),
    )
