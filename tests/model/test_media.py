"""Pictures, frames and sound in a pass, against transformers' modules with the mask that Gemma 4 was made for."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from specdec.hf import decoder_of
from specdec.model.media import MediaBlock, check_media, chunk_end
from tests.support.media.prompts import (
    AUDIO,
    HIDDEN,
    IMAGE,
    VIDEO,
    MediaPrompt,
    frame,
    media_prompt,
    picture,
    read,
    sound,
)
from tests.support.tiny import WINDOW, prompt, tiny_model
from tests.support.tiny_decoder import of

TOLERANCE = 1e-4
PROMPTS: dict[str, MediaPrompt] = {
    "a small picture": media_prompt(5, picture(9), 30),
    "a picture at the very beginning": media_prompt(picture(20), 8),
    "a picture of one row": media_prompt(3, picture(1), 20),
    "a picture as long as the window": media_prompt(7, picture(WINDOW), 40),
    "a picture longer than the window": media_prompt(40, picture(60), 3 * WINDOW),
    "a picture longer than a pass": media_prompt(30, picture(200), 50),
    "pictures side by side": media_prompt(2, picture(30, 1), picture(31, 2), picture(70, 3), 9),
    "sound": media_prompt(11, sound(90), 25),
    "frames": media_prompt(4, *(part for i in range(5) for part in (3, frame(21, i))), 12),
    "all of them, past the window": media_prompt(
        20, picture(33, 1), 90, sound(40, 2), 6, frame(22, 3), 2, frame(22, 4), 1, sound(70, 5), picture(100, 6), 30
    ),
    "the answer follows a picture": media_prompt(10, picture(25)),
}


def intended_masks(model: transformers.PreTrainedModel, ids: Tensor, embeds: Tensor) -> dict[str, Tensor]:
    """The masks of full and sliding layers for ids [1, n]: see each picture as a whole in sliding layers alone."""
    types = (ids == IMAGE) * 1 + (ids == VIDEO) * 2 + (ids == AUDIO) * 3
    positions = torch.arange(ids.shape[1])[None]
    blocks = get_block_sequence_ids_for_mask(types, device=ids.device)
    config = model.config.get_text_config()
    return create_masks_for_vision_model(  # type: ignore[no-any-return]
        config, embeds, torch.ones_like(ids), None, positions, block_sequence_ids=blocks
    )


def theirs(given: MediaPrompt) -> Tensor:
    """Transformers' logits [n, vocab]."""
    model = tiny_model("gemma4_unified")
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(given.ids)
        for block in given.media:
            embeds[block.start : block.end] = block.rows()
        masks = intended_masks(model, given.ids[None], embeds[None])
        return model(inputs_embeds=embeds[None], attention_mask=masks).logits[0]  # type: ignore[no-any-return]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_agree_with_transformers_however_a_prompt_is_cut(name: str) -> None:
    given, decoder = PROMPTS[name], decoder_of(tiny_model("gemma4_unified"))
    found = decoder.logits(read(decoder, given, 64).last)
    assert relative(found, theirs(given)) < TOLERANCE
    for most in (1, 7, 33, 1000):
        assert torch.equal(decoder.logits(read(decoder, given, most).last), found), f"chunks of {most} rows change bits"


def test_rows_of_a_picture_see_later_ones_in_sliding_layers_alone() -> None:
    """What changes when the last row of a picture does: its earlier rows, and no text before it."""
    decoder, given = decoder_of(tiny_model("gemma4_unified")), media_prompt(20, picture(30), 20)
    (block,) = given.media
    other = torch.cat((block.rows()[:-1], torch.ones(1, HIDDEN)))
    before, after = (
        read(decoder, MediaPrompt(given.ids, (MediaBlock(block.start, block.end, b"", whole, lambda: other),)), 64).last
        for whole in (True, False)
    )
    unchanged = (read(decoder, given, 64).last == before).all(dim=1)
    assert unchanged[: block.start].all()
    assert not unchanged[block.start :].any()
    causal = MediaPrompt(given.ids, (MediaBlock(block.start, block.end, b"", False, block.rows),))
    assert (read(decoder, causal, 64).last == after).all(dim=1)[: block.end - 1].all()
    spans = decoder.spans([(0, len(given.ids))], [given.media])
    own = list(range(1, len(given.ids) + 1))
    assert spans["full_attention"].end == own
    assert spans["sliding_attention"].end == [block.end if block.start < end <= block.end else end for end in own]
    assert spans["sliding_attention"].first == [max(0, end - WINDOW) for end in own]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("storage", [None, "int8"], ids=["op by op", "native"])
def test_texts_with_media_beside_others_have_the_bits_of_each_alone(storage: str | None, kept: torch.dtype) -> None:
    decoder = of("gemma4_unified", kept, storage)
    texts = [PROMPTS[name] for name in ("a picture longer than a pass", "all of them, past the window", "sound")]
    texts.insert(1, MediaPrompt(prompt(90, seed=7)[0], ()))
    alone = [read(decoder, text, 1) for text in texts]
    for most in (3, 50, 300):
        caches, done = [decoder.new_cache() for _ in texts], [0] * len(texts)
        while active := [i for i, text in enumerate(texts) if done[i] < len(text.ids)]:
            ends = [chunk_end(texts[i].media, done[i], len(texts[i].ids), most) for i in active]
            rows = [texts[i].ids[done[i] : end] for i, end in zip(active, ends, strict=True)]
            media = [texts[i].media for i in active]
            states = decoder.forward_many(rows, [caches[i] for i in active], (), media)
            for i, part in zip(active, states.split(list(map(len, rows))), strict=True):
                assert torch.equal(part.last, alone[i].last[done[i] : done[i] + len(part)]), f"text {i} at {done[i]}"
                caches[i].commit(len(part))
                done[i] += len(part)


@pytest.mark.parametrize("storage", [None, "int8"], ids=["op by op", "native"])
def test_states_of_other_layers_come_with_a_long_pass(storage: str | None) -> None:
    decoder, given = of("gemma4_unified", None, storage), PROMPTS["a picture longer than a pass"]
    one, other = (read(decoder, given, most, aux_layers=(3, 0)) for most in (1000, 10))
    assert torch.equal(one.last, other.last)
    assert all(map(torch.equal, one.aux, other.aux))
    assert len(one.aux) == 2


def test_a_pass_that_is_forgotten_leaves_no_trace() -> None:
    decoder, given = of("gemma4_unified", torch.int8, "int8"), PROMPTS["a picture longer than a pass"]
    whole, cache = read(decoder, given, 64).last, decoder.new_cache()
    while cache.length < len(given.ids):
        end = chunk_end(given.media, cache.length, len(given.ids), 20)
        chunk = given.ids[cache.length : end]
        for kept in (0, len(chunk)):
            states = decoder.forward(chunk, cache, (), given.media)
            assert torch.equal(states.last, whole[cache.length : end])
            cache.commit(kept)


def test_chunks_end_at_the_edges_of_whole_blocks() -> None:
    def ends(given: MediaPrompt, most: int) -> list[int]:
        found = [0]
        while found[-1] < len(given.ids):
            found.append(chunk_end(given.media, found[-1], len(given.ids), most))
        return found[1:]

    assert ends(media_prompt(10, picture(280), 20), 64) == [11, 291, 312]  # nearer to 64 than 291 is
    assert ends(media_prompt(10, picture(60), 100), 64) == [71, 135, 172]  # nearer to 64 than 11 is
    assert ends(media_prompt(10, picture(60), 100), 32) == [11, 71, 103, 135, 167, 172]
    assert ends(media_prompt(10, picture(30), 5, frame(90), 1), 64) == [48, 138, 140]
    assert ends(media_prompt(10, sound(100), 20), 64) == [64, 111, 132]  # sound is cut; its end is a chunk's
    for given in PROMPTS.values():
        for most in (1, 10, 64):
            found = ends(given, most)
            assert found == sorted({*found}), "a chunk has rows"
            assert not any(b.whole and b.start < end < b.end for b in given.media for end in found)
            assert not given.media or given.media[-1].end in found


def test_blocks_in_a_wrong_order_are_refused() -> None:
    (block,) = media_prompt(5, picture(9), 5).media
    check_media((block,), block.end)
    for media, length in (((block, block), 40), ((block,), block.end - 1)):
        with pytest.raises(ValueError, match="list blocks by their positions"):
            check_media(media, length)


def whole_model() -> transformers.PreTrainedModel:
    """Transformers' whole multimodal model around the tiny text model: its embedder of pictures and sound too."""
    text_model = tiny_model("gemma4_unified")
    ids = {"image_token_id": IMAGE, "audio_token_id": AUDIO, "video_token_id": VIDEO}
    vision = transformers.Gemma4UnifiedVisionConfig(mm_embed_dim=24, output_proj_dims=24)
    config = transformers.Gemma4UnifiedConfig(
        text_config=text_model.config, vision_config=vision, audio_config=transformers.Gemma4UnifiedAudioConfig(), **ids
    )
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    model = transformers.Gemma4UnifiedForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
            )
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    model.lm_head.load_state_dict(text_model.lm_head.state_dict())
    return model


def test_embedded_pictures_sound_and_video_agree_with_transformers() -> None:
    """All the way from pixels and samples: a picture of 5 x 4 patches, a clip of 30 frames, a video of two frames."""
    model, generator = whole_model(), torch.Generator().manual_seed(2)

    def patches(columns: int, rows: int) -> tuple[Tensor, Tensor]:
        grid = torch.arange(columns * rows)
        at = torch.stack((grid % columns, grid // columns), dim=1)
        return torch.rand(1, len(grid), 6912, generator=generator), at[None]

    pixels, at = patches(5, 4)
    frames, frames_at = map(torch.cat, zip(*(patches(4, 3) for _ in range(2)), strict=True))
    samples = torch.randn(1, 30, 640, generator=generator) * 0.1
    given = media_prompt(6, picture(20), 8, frame(12, 1), 2, frame(12, 2), 5, sound(30), 9)
    heard = torch.ones(1, 30, dtype=torch.bool)
    with torch.inference_mode():
        seen = {
            "image": model.model.get_image_features(pixels, at),
            "video": model.model.get_video_features(frames, frames_at, torch.tensor([2])),
        }
        masks = intended_masks(model, given.ids[None], model.get_input_embeddings()(given.ids[None]))
        expected = model(
            input_ids=given.ids[None],
            attention_mask=masks,
            mm_encoder_outputs=seen,
            input_features=samples,
            input_features_mask=heard,
        ).logits[0]
        shown = torch.cat([part for kind in ("image", "video") for part in seen[kind].pooler_output])
        parts = [*shown.split([20, 12, 12]), model.model.get_audio_features(samples, heard).pooler_output[0]]
    blocks = tuple(
        MediaBlock(block.start, block.end, block.key, block.whole, lambda part=part: part)  # type: ignore[misc]
        for block, part in zip(given.media, parts, strict=True)
    )
    decoder = decoder_of(tiny_model("gemma4_unified"))
    found = decoder.logits(read(decoder, MediaPrompt(given.ids, blocks), 64).last)
    assert relative(found, expected) < TOLERANCE
