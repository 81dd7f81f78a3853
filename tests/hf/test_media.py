"""Pictures, videos and sound through transformers' face: logits and texts, alone and in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import pipeline
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

import specdec
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config
from specdec.drafting.registry import resolve_drafter
from specdec.hf import SpecdecForCausalLM, decoder_of
from specdec.memory.plan import conversations_of
from tests.support.media.tiny_media import (
    AUDIO,
    IMAGE,
    TOKENS,
    VIDEO,
    clips,
    padded,
    pictures,
    prompt_ids,
    soft,
    tiny_media_model,
    token_types,
)
from tests.support.tiny import prompt

TEXT = [prompt(40, seed=seed)[0].clamp(max=239).tolist() for seed in range(6)]
PROMPTS: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
    "a picture past the window": (prompt_ids(TEXT[0], soft(IMAGE, 60), TEXT[1], TEXT[2]), pictures((10, 6))),
    "sound after text": (prompt_ids(TEXT[3], soft(AUDIO, 50), 7), clips(50)),
    "a video": (
        prompt_ids(9, soft(VIDEO, 12), 4, soft(VIDEO, 12), 5, soft(VIDEO, 6), TEXT[4]),
        pictures((4, 3), (3, 4), (2, 3), video=True),
    ),
    "all of them": (
        prompt_ids(TEXT[0][:9], soft(IMAGE, 6), 8, soft(AUDIO, 20), soft(VIDEO, 15), soft(IMAGE, 63), TEXT[5][:20]),
        {**pictures((3, 2), (9, 7)), **pictures((5, 3), seed=5, video=True), **clips(20)},
    ),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.9, "top_k": 0, "seed": 3}


@pytest.fixture
def model() -> SpecdecForCausalLM:
    decoder, theirs = decoder_of(tiny_media_model()), tiny_media_model()
    return SpecdecForCausalLM(
        decoder, theirs.config, theirs.generation_config, resolve_drafter("suffix"), conversations_of(decoder)
    )


def transformers_logits(ids: Tensor, inputs: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Logits [rows, n, vocab] under the mask that the model was made for."""
    model, mask = tiny_media_model(), torch.ones_like(ids) if mask is None else mask
    positions = mask.cumsum(-1).clamp(min=1) - 1
    embeds = torch.zeros(*ids.shape, model.config.text_config.hidden_size)
    masks = create_masks_for_vision_model(
        model.config.get_text_config(), embeds, mask, None, positions,
        block_sequence_ids=get_block_sequence_ids_for_mask(token_types(ids), ids.device),
    )  # fmt: skip
    given = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    with torch.no_grad():
        features: dict[str, Any] = {}
        if "pixel_values" in inputs:
            pixels, at = inputs["pixel_values"], inputs["image_position_ids"]
            features["image"] = model.model.get_image_features(pixels, at, return_dict=True)
        if "pixel_values_videos" in inputs:
            frames = {name: value for name, value in inputs.items() if "video" in name}
            features["video"] = model.model.get_video_features(**frames, return_dict=True)
        output = model(ids, attention_mask=masks, position_ids=positions, mm_encoder_outputs=features, **given)
    return output.logits  # type: ignore[no-any-return]


def texts(model: SpecdecForCausalLM, ids: Tensor, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    found = model.generate(ids, **{**GREEDY, "draft_length": 3, **inputs, **options})
    return found[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_transformers(name: str, model: SpecdecForCausalLM) -> None:
    ids, inputs = PROMPTS[name]
    ours, theirs = model(ids, **inputs).logits, transformers_logits(ids, inputs)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    causal = model(ids, mm_token_type_ids=token_types(ids), **inputs).logits
    assert torch.equal(causal, ours)


def test_rows_with_padding_are_those_of_transformers(model: SpecdecForCausalLM) -> None:
    first, second = (PROMPTS[name] for name in ("a picture past the window", "sound after text"))
    ids, mask = padded(first[0], second[0], prompt_ids(TEXT[1]))
    inputs = {**first[1], **second[1]}
    ours, theirs = model(ids, attention_mask=mask, **inputs).logits, transformers_logits(ids, inputs, mask)
    kept = mask.bool()
    assert (ours - theirs)[kept].abs().max() < 1e-4 * theirs[kept].abs().max()
    assert torch.equal(ours[1, -second[0].shape[1] :], model(second[0], **second[1]).logits[0])


def test_a_forward_pass_goes_on_after_media_and_with_media(model: SpecdecForCausalLM) -> None:
    ids, inputs = PROMPTS["all of them"]
    whole = model(ids, **inputs, output_hidden_states=True)
    begin = int((ids[0] == IMAGE).nonzero()[10])  # inside of the second picture
    with pytest.raises(ValueError, match="makes 63 soft tokens"):
        model(ids[:, :begin], **inputs)
    cut = begin - 5  # its begin token
    assert ids[0, cut] == TOKENS["boi_token_id"]
    one = {
        name: value[:1] if name in ("pixel_values", "image_position_ids") else value for name, value in inputs.items()
    }
    first = model(ids[:, :cut], **one)
    second = model(ids[:, cut:], past_key_values=first.past_key_values, pixel_values=inputs["pixel_values"][1:],
                   image_position_ids=inputs["image_position_ids"][1:])  # fmt: skip
    assert torch.equal(torch.cat((first.logits, second.logits), dim=1), whole.logits)
    (block,) = {id(hidden): hidden for hidden in whole.hidden_states[:1]}.values()
    media = model.decoder.media
    assert media is not None
    at = inputs["image_position_ids"][0, :6]
    assert torch.equal(block[0, 10:16], media.patches(inputs["pixel_values"][0, :6], at))


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafted_texts_are_plain_ones(name: str, options: dict[str, Any], model: SpecdecForCausalLM) -> None:
    ids, inputs = PROMPTS[name]
    plain = texts(model, ids, inputs, speculation=False, reuse=False, **options)
    assert texts(model, ids, inputs, **options) == plain
    assert texts(model, ids, {**inputs, "mm_token_type_ids": token_types(ids)}, **options) == plain  # from the cache
    assert not {*plain[0]} & {*TOKENS.values()}  # the generation config suppresses them


def test_a_greedy_text_is_that_of_transformers_logits(model: SpecdecForCausalLM) -> None:
    ids, inputs = PROMPTS["all of them"]
    never = torch.tensor(sorted(TOKENS.values()))
    text = ids
    for _ in range(8):
        logits = transformers_logits(text, inputs)[0, -1].index_fill(0, never, -torch.inf)
        text = torch.cat((text, logits.argmax()[None, None]), dim=1)
    assert texts(model, ids, inputs, max_new_tokens=8) == text[:, ids.shape[1] :].tolist()


def test_rows_of_a_batch_have_the_texts_that_they_have_alone(model: SpecdecForCausalLM) -> None:
    alone = [texts(model, ids, inputs, reuse=False)[0] for ids, inputs in PROMPTS.values()]
    ids, mask = padded(*(ids for ids, _ in PROMPTS.values()), prompt_ids(TEXT[2]))
    alone.append(texts(model, prompt_ids(TEXT[2]), {}, reuse=False)[0])
    rows = [inputs for _, inputs in PROMPTS.values()]

    def every(name: str) -> list[Tensor]:
        return [row[name] for row in rows if name in row]

    longest = max(part.shape[1] for part in every("input_features"))
    widen = torch.nn.functional.pad
    inputs = {
        **{name: torch.cat(every(name)) for name in rows[-1] if not name.startswith("input_features")},
        "input_features": torch.cat([widen(p, (0, 0, 0, longest - p.shape[1])) for p in every("input_features")]),
        "input_features_mask": torch.cat([widen(p, (0, longest - p.shape[1])) for p in every("input_features_mask")]),
        "mm_token_type_ids": token_types(ids),
    }
    assert texts(model, ids, {**inputs, "attention_mask": mask}, reuse=False) == alone


def test_several_answers_to_one_prompt_see_its_media(model: SpecdecForCausalLM) -> None:
    ids, inputs = PROMPTS["all of them"]
    many = texts(model, ids, inputs, **{**SAMPLED, "num_return_sequences": 3})
    assert many[0] == texts(model, ids, inputs, **SAMPLED)[0]
    assert len({tuple(text) for text in many}) == 3


def test_a_second_picture_never_answers_for_the_first(model: SpecdecForCausalLM) -> None:
    ids = prompt_ids(TEXT[0], soft(IMAGE, 60), TEXT[1])
    one, two = pictures((10, 6), seed=1), pictures((10, 6), seed=2)
    fresh = [texts(model, ids, picture, reuse=False) for picture in (one, two)]
    assert fresh[0] != fresh[1]
    for turn in (0, 1, 1, 0):
        assert texts(model, ids, (one, two)[turn]) == fresh[turn]
    assert model.last_stats.reused > 100
    longer = torch.cat((ids, torch.tensor(fresh[0]), torch.tensor([TEXT[2]])), dim=1)
    again = texts(model, longer, one)
    assert model.last_stats.reused >= ids.shape[1]
    assert again == texts(model, longer, one, reuse=False)


def test_media_that_do_not_fit_are_refused(model: SpecdecForCausalLM) -> None:
    ids, _inputs = PROMPTS["a picture past the window"]
    for call in (model.generate, model):
        with pytest.raises(ValueError, match=r"pixel_values\[0\] makes 6 soft tokens, and its place .* has 60"):
            call(ids, **pictures((3, 2)))
        with pytest.raises(ValueError, match=r"soft tokens of a picture .* no pixel_values"):
            call(ids)


def test_a_model_that_transformers_loaded_sees_and_hears_too() -> None:
    theirs = tiny_media_model()
    for name in ("a picture past the window", "sound after text", "a video", "all of them"):
        ids, inputs = PROMPTS[name]
        decoder = decoder_of(theirs)
        ours = SpecdecForCausalLM(decoder, theirs.config, theirs.generation_config, resolve_drafter(None))
        expected = texts(ours, ids, inputs)
        given = {**inputs, "mm_token_type_ids": token_types(ids), **GREEDY}
        borrowed = theirs.generate(ids, **given, custom_generate=specdec.speculative, drafter="suffix", draft_length=3)
        assert borrowed[:, ids.shape[1] :].tolist() == expected
    with pytest.raises(ValueError, match="num_return_sequences with pictures or sound"):
        theirs.generate(
            ids, **given | {"do_sample": True, "num_return_sequences": 2}, custom_generate=specdec.speculative
        )


@pytest.fixture(scope="module", params=[None, "q8_0"], ids=["folder", "gguf"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and a processor, in each format."""
    folder = tmp_path_factory.mktemp("written") / "model"
    write_model(full_size_config("gemma-4-tiny"), None, folder, gguf=request.param)
    return folder


CHAT: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def conversation(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_messages_with_media_are_answered(written: Path) -> None:
    model, processor = specdec.load(written, drafter="suffix", device="cpu"), specdec.load_processor(written)
    noise = np.random.default_rng(0)
    photo = Image.fromarray(noise.integers(0, 256, (90, 160, 3), dtype=np.uint8))
    tone = np.sin(np.arange(9000) / 9).astype(np.float32)
    messages = conversation(
        {"type": "image", "image": photo}, {"type": "text", "text": "What is this?"}, {"type": "audio", "audio": tone}
    )
    inputs = processor.apply_chat_template(messages, **CHAT, processor_kwargs={"max_soft_tokens": 70})
    assert inputs["mm_token_type_ids"].unique().tolist() == [0, 1, 3]
    asked = {**inputs, **GREEDY, "draft_length": 3}
    answer = model.generate(**asked)
    assert torch.equal(answer, model.generate(**asked, speculation=False, reuse=False))
    dark = conversation({"type": "image", "image": Image.new("RGB", (160, 90))}, *messages[0]["content"][1:])
    inputs = processor.apply_chat_template(dark, **CHAT, processor_kwargs={"max_soft_tokens": 70})
    assert not torch.equal(answer, model.generate(**inputs, **GREEDY))


def test_a_pipeline_for_pictures_and_text(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = specdec.load(written, drafter="suffix", device="cpu"), specdec.load_processor(written)
    Image.new("RGB", (48, 96), "red").save(tmp_path / "red.png")
    messages = conversation({"type": "image", "path": str(tmp_path / "red.png")}, {"type": "text", "text": "A colour?"})
    ask = pipeline("image-text-to-text", model=model, processor=processor, tokenizer=processor.tokenizer)
    answer = ask(text=messages, max_new_tokens=9, return_full_text=False)
    inputs = processor.apply_chat_template(messages, **CHAT)
    output = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer[0]["generated_text"] == text
    assert "not supported" not in capsys.readouterr().err
