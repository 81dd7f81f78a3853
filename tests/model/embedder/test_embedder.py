"""The embedder against transformers' modules, and its rows by themselves."""

from __future__ import annotations

import pytest
import torch

from specdec.hf import decoder_of
from specdec.model.embedder.embedder import ROWS, MediaEmbedder
from tests.support.media.tiny_media import FRAME, PATCH, clips, pictures, tiny_media_model


@pytest.fixture(scope="module")
def embedder() -> MediaEmbedder:
    media = decoder_of(tiny_media_model()).media
    assert media is not None
    return media


def test_pictures_are_embedded_as_transformers_does(embedder: MediaEmbedder) -> None:
    inputs = pictures((10, 6), (3, 2), (1, 70))
    with torch.no_grad():
        expected = tiny_media_model().model.get_image_features(**inputs).pooler_output
    for pixels, positions, theirs in zip(inputs["pixel_values"], inputs["image_position_ids"], expected, strict=True):
        kept = positions[:, 0] >= 0
        ours = embedder.patches(pixels[kept], positions[kept])
        assert theirs.abs().max() > 0.5
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sound_is_embedded_as_transformers_does(embedder: MediaEmbedder) -> None:
    inputs = clips(9)
    with torch.no_grad():
        expected = tiny_media_model().model.get_audio_features(**inputs).pooler_output[0]
    torch.testing.assert_close(embedder.frames(inputs["input_features"][0]), expected, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_with_any_rows_beside_it(embedder: MediaEmbedder) -> None:
    count = ROWS + 13
    generator = torch.Generator().manual_seed(4)
    patches, frames = torch.rand(count, PATCH, generator=generator), torch.randn(count, FRAME, generator=generator)
    at = torch.stack((torch.arange(count) % 20, torch.arange(count) // 20), dim=1)
    every, heard = embedder.patches(patches, at), embedder.frames(frames)
    for first, last in ((0, 1), (0, 7), (5, 70), (ROWS - 3, ROWS + 2), (count - 1, count)):
        part = slice(first, last)
        assert torch.equal(embedder.patches(patches[part], at[part]), every[part])
        assert torch.equal(embedder.frames(frames[part]), heard[part])


def test_positions_are_columns_and_rows(embedder: MediaEmbedder) -> None:
    pixels = torch.rand(1, PATCH, generator=torch.Generator().manual_seed(1)).expand(2, -1)
    one, other = embedder.patches(pixels, torch.tensor([[3, 5], [5, 3]]))
    assert not torch.allclose(one, other, atol=1e-2)
