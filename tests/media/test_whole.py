"""From files to answers: the processor's inputs in `generate`, in a batch, and in transformers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image
from transformers import pipeline

import specdec
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config
from specdec.media.processor import Processor
from tests.support.media.clips import moving, tones, write_video
from tests.support.media.pictures import smooth

Loaded = tuple[specdec.SpecdecForCausalLM, Processor]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_model(full_size_config("gemma-4-tiny"), None, folder)
    return specdec.load(folder, drafter="suffix", device="cpu"), specdec.load_processor(folder)


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, dict[str, Any]]:
    Image.fromarray(smooth(100, 150)).save(tmp_path / "cat.png")
    soundfile.write(tmp_path / "clip.wav", tones(16_000)[:, 0], 16_000)
    write_video(tmp_path / "talk.mp4", moving(4))
    names = {"image": "cat.png", "audio": "clip.wav", "video": "talk.mp4"}
    return {kind: {"type": kind, "path": str(tmp_path / name)} for kind, name in names.items()}


def chat(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what?"}]}]


def answers(loaded: Loaded, conversations: list[Any]) -> list[list[int]]:
    model, processor = loaded
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=6, eos_token_id=None)
    assert isinstance(output, torch.Tensor)
    return [row[inputs["input_ids"].shape[1] :].tolist() for row in output]


def test_rows_of_a_batch_have_the_text_that_they_have_alone(loaded: Loaded, parts: dict[str, Any]) -> None:
    rows = [chat(), chat(parts["image"]), chat(parts["video"]), chat(parts["audio"]), chat(*parts.values())]
    together = answers(loaded, rows)
    assert together == [answers(loaded, [row])[0] for row in rows]
    assert len({tuple(row) for row in together}) > 2, "what is shown and heard counts"


def test_transformers_pipeline(loaded: Loaded, parts: dict[str, Any]) -> None:
    model, processor = loaded
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    conversation = chat(parts["image"])
    said = pipe(text=conversation, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs.convert_to_tensors("pt"), max_new_tokens=6)
    assert said == processor.decode(ids[0, len(inputs["input_ids"][0]) :], skip_special_tokens=True)


def test_transformers_pipeline_for_any_medium(
    loaded: Loaded, parts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = loaded
    pipe = pipeline("any-to-any", model=model, processor=processor)
    assert "not supported" not in capsys.readouterr().err
    conversation = chat(*parts.values())
    for options in ({}, {"processor_kwargs": {"num_frames": 2}}):
        said = pipe(text=conversation, max_new_tokens=6, return_full_text=False, **options)[0]["generated_text"]
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        ids = model.generate(**inputs, max_new_tokens=6)
        assert said == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    whole = pipe(text=conversation, max_new_tokens=6)[0]["generated_text"]
    assert whole[:-1] == conversation and whole[-1]["role"] == "assistant"
    sound = pipe(text="<|audio|> what?", audio=parts["audio"]["path"], max_new_tokens=2, return_full_text=False)
    assert isinstance(sound[0]["generated_text"], str)
    with pytest.raises(ValueError, match="generation_mode"):
        pipe(text=conversation, generation_mode="audio")
