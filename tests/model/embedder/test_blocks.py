"""Media blocks: where they stand, what their rows and keys are, and counts that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.hf import decoder_of
from specdec.model.embedder.blocks import media_blocks
from specdec.model.embedder.embedder import MediaEmbedder
from specdec.model.embedder.inputs import MediaInputs
from specdec.model.media import MediaBlock
from tests.support.media.tiny_media import (
    AUDIO,
    BOI,
    IMAGE,
    PATCH,
    VIDEO,
    clips,
    padded,
    pictures,
    prompt_ids,
    soft,
    tiny_media_model,
    token_types,
)
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def embedder() -> MediaEmbedder:
    media = decoder_of(tiny_media_model()).media
    assert media is not None
    return media


def blocks(embedder: MediaEmbedder | None, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Any:
    return media_blocks(ids, mask, MediaInputs.of(inputs), embedder)


def places(row: tuple[MediaBlock, ...]) -> list[tuple[int, int, bool]]:
    return [(block.start, block.end, block.whole) for block in row]


MIXED = prompt_ids(5, soft(IMAGE, 6), 7, soft(AUDIO, 4), soft(VIDEO, 2), 8, 9, soft(VIDEO, 3), soft(IMAGE, 2), 11)
MIXED_INPUTS = {**pictures((3, 2), (2, 1)), **pictures((2, 1), (1, 3), seed=7, video=True), **clips(4)}


def test_blocks_stand_where_transformers_puts_its_features(embedder: MediaEmbedder) -> None:
    (row,) = blocks(embedder, MIXED, mm_token_type_ids=token_types(MIXED), **MIXED_INPUTS)
    assert places(row) == [(2, 8, True), (11, 15, False), (17, 19, True), (23, 26, True), (28, 30, True)]
    model = tiny_media_model()
    seen = {}
    hook = model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs), with_kwargs=True
    )
    # The features are what the decoder is given; their frames per video only pass in later versions.
    features = model.model.get_video_features(
        **{name: value for name, value in MIXED_INPUTS.items() if "video" in name}, return_dict=True
    )
    others = {name: value for name, value in MIXED_INPUTS.items() if "image" in name or "input" in name}
    given = {"mm_encoder_outputs": {"video": features, "image": model.model.get_image_features(
        MIXED_INPUTS["pixel_values"], MIXED_INPUTS["image_position_ids"], return_dict=True
    )}}  # fmt: skip
    with torch.no_grad():
        model.model(input_ids=MIXED, **{name: v for name, v in others.items() if "input" in name}, **given)
    hook.remove()
    for block in row:
        theirs = seen["inputs_embeds"][0, block.start : block.end]
        torch.testing.assert_close(block.rows(), theirs, rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_take_media_in_order_of_appearance(embedder: MediaEmbedder) -> None:
    first, second = (
        prompt_ids(5, soft(IMAGE, 6)),
        prompt_ids(3, 4, soft(IMAGE, 4), 9, soft(IMAGE, 2), 5, soft(AUDIO, 3)),
    )
    ids, mask = padded(first, prompt_ids(9), second)
    inputs = {**pictures((3, 2), (2, 2), (1, 2)), **clips(3)}
    found = blocks(embedder, ids, mask, mm_token_type_ids=token_types(ids), **inputs)
    assert [places(row) for row in found] == [
        [(2, 8, True)],
        [],
        [(3, 7, True), (10, 12, True), (15, 18, False)],
    ]
    alone = [
        *blocks(embedder, first, **pictures((3, 2))),
        *blocks(embedder, second, pixel_values=inputs["pixel_values"][1:],
                image_position_ids=inputs["image_position_ids"][1:], **clips(3)),
    ]  # fmt: skip
    for row, same in zip((found[0], found[2]), alone, strict=True):
        for block, other in zip(row, same, strict=True):
            assert block.key == other.key
            assert torch.equal(block.rows(), other.rows())


def test_keys_tell_contents_positions_and_embedders_apart(embedder: MediaEmbedder) -> None:
    ids = prompt_ids(soft(IMAGE, 6), 3)
    inputs = pictures((3, 2))
    changed = inputs["pixel_values"].clone()
    changed[0, 5, 11] += 1e-3
    padding = inputs["pixel_values"].clone()
    padding[0, 6:] = 1.0  # of no patch
    turned = pictures((2, 3))["image_position_ids"]

    def key(other: MediaEmbedder = embedder, **changes: Tensor) -> bytes:
        ((block,),) = blocks(other, ids, **{**inputs, **changes})
        return block.key

    assert key() == key(pixel_values=padding)
    assert len({key(), key(pixel_values=changed), key(image_position_ids=turned)}) == 3
    half = MediaEmbedder(embedder.spec, embedder.vision, embedder.audio, torch.bfloat16, embedder.device)
    assert key(half) != key()
    sound = prompt_ids(soft(AUDIO, 3))
    keys = {blocks(embedder, sound, **clips(3, seed=seed))[0][0].key for seed in (0, 0, 1)}
    assert len(keys) == 2


def test_a_masked_picture_is_not_there(embedder: MediaEmbedder) -> None:
    ids = prompt_ids(soft(IMAGE, 2), 3, soft(IMAGE, 4))
    mask = torch.tensor([[0] * 4 + [1] * 7])
    (row,) = blocks(embedder, ids, mask, **pictures((1, 2), (2, 2)))
    assert places(row) == [(2, 6, True)]
    assert torch.equal(row[0].rows(), blocks(embedder, ids, **pictures((1, 2), (2, 2)))[0][1].rows())
    mask[0, :2], mask[0, 2:4] = 0, 1
    with pytest.raises(ValueError, match="attention_mask hides a part of a picture in row 0"):
        blocks(embedder, ids, mask, **pictures((1, 2), (2, 2)))


def test_what_transformers_has_embedded_is_taken(embedder: MediaEmbedder) -> None:
    ids = prompt_ids(soft(IMAGE, 6), 7, soft(IMAGE, 4))
    features = tiny_media_model().model.get_image_features(**pictures((3, 2), (2, 2)), return_dict=True)
    (row,) = blocks(embedder, ids, mm_encoder_outputs={"image": features})
    for block, theirs in zip(row, features.pooler_output, strict=True):
        assert torch.equal(block.rows(), theirs)
    with pytest.raises(ValueError, match="makes 10 soft tokens, and the prompts have places for 6"):
        blocks(embedder, prompt_ids(soft(IMAGE, 6)), mm_encoder_outputs={"image": features})


@pytest.mark.parametrize(
    ("ids", "inputs", "message"),
    [
        (prompt_ids(soft(IMAGE, 6)), pictures((3, 2), (2, 2)), "pixel_values has 2, and the prompts have places for 1"),
        (
            prompt_ids(soft(IMAGE, 6), soft(IMAGE, 6)),
            pictures((3, 2)),
            "more runs of a picture's soft token .* than the 1",
        ),
        (prompt_ids(soft(IMAGE, 5)), pictures((3, 2)), r"pixel_values\[0\] makes 6 soft tokens.* has 5"),
        (prompt_ids(soft(IMAGE, 12)), pictures((3, 2), (3, 2)), r"makes 6 soft tokens.* has 12"),
        (prompt_ids(3, 4), pictures((3, 2)), "places for 0"),
        (prompt_ids(soft(IMAGE, 6)), {}, "row 0 has 6 soft tokens of a picture .* no pixel_values"),
        (prompt_ids(soft(VIDEO, 6)), pictures((3, 2)), "no pixel_values_videos|places for 0"),
        (prompt_ids(soft(AUDIO, 6)), clips(7), "makes 7 soft tokens"),
        (prompt_ids(soft(AUDIO, 7)), {"input_features": clips(7)["input_features"]}, "needs input_features_mask"),
        (prompt_ids(soft(IMAGE, 6)), {"pixel_values": pictures((3, 2))["pixel_values"]}, "needs image_position_ids"),
        (
            prompt_ids(soft(IMAGE, 6)),
            {**pictures((3, 2)), "pixel_values": torch.zeros(1, 70, 768)},
            rf"must be \[pictures, patches, {PATCH}\]",
        ),
        (
            prompt_ids(soft(IMAGE, 6)),
            {**pictures((3, 2)), "image_position_ids": torch.full((1, 70, 2), 1120)},
            r"must lie in 0\.\.1119",
        ),
        (
            prompt_ids(soft(IMAGE, 1121)),
            {
                "pixel_values": torch.zeros(1, 1, 1).expand(1, 1121, PATCH),
                "image_position_ids": torch.zeros(1, 1121, 2),
            },
            "a picture of 1121 patches; the largest one has 1120",
        ),
        (
            prompt_ids(soft(VIDEO, 6)),
            {**pictures((3, 2), video=True), "num_frames_per_video": torch.tensor([2])},
            "has 1 frames, and num_frames_per_video says 2",
        ),
        (
            prompt_ids(soft(IMAGE, 6)),
            {**pictures((3, 2)), "mm_token_type_ids": torch.zeros(1, 8, dtype=torch.long)},
            "mm_token_type_ids must be 1, 2 and 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    embedder: MediaEmbedder, ids: Tensor, inputs: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        blocks(embedder, ids, **inputs)


def test_a_soft_token_that_a_model_chose_is_a_token(embedder: MediaEmbedder) -> None:
    assert blocks(embedder, prompt_ids(4, IMAGE, 7, BOI, 8, VIDEO, VIDEO)) == [()]


def test_a_model_without_an_embedder_says_what_is_missing() -> None:
    text = decoder_of(tiny_model("gemma4_unified")).media
    assert text is None
    for inputs in (pictures((3, 2)), clips(3), {"mm_token_type_ids": torch.ones(1, 8, dtype=torch.long)}):
        with pytest.raises(ValueError, match=rf"{next(iter(inputs))}: .*vision_embedder.*mmproj"):
            blocks(text, prompt_ids(soft(IMAGE, 6)), **inputs)
    nothing = blocks(text, prompt_ids(soft(IMAGE, 6)), mm_token_type_ids=torch.zeros(1, 8, dtype=torch.long))
    assert nothing == [()]


def test_a_model_with_a_part_of_an_embedder_says_what_is_missing(embedder: MediaEmbedder) -> None:
    spec = embedder.spec.of_parts(vision=False, audio=True)
    assert spec is not None
    deaf = MediaEmbedder(spec, None, embedder.audio, embedder.dtype, embedder.device)
    assert places(blocks(deaf, prompt_ids(soft(AUDIO, 3)), **clips(3))[0]) == [(1, 4, False)]
    with pytest.raises(ValueError, match="pixel_values: this model was loaded without an embedder"):
        blocks(deaf, prompt_ids(soft(IMAGE, 6)), **pictures((3, 2)))
