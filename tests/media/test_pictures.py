"""Pictures as numbers: what transformers gives for them (recorded), and pictures that cannot be used."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

from specdec.media import pictures
from specdec.media.pictures import BUDGETS, SIDE, cut_patches, fitted_size, read_pixels, stack_patches
from specdec.media.sound import read_sound
from specdec.media.video import open_clip
from tests.support.media.pictures import exif_rotated, noise, odd_pictures, picture_files, smooth
from tests.support.media.reference import EXPECTED, digest

RECORDED = json.loads(EXPECTED.read_text())["pictures"]
ODD = odd_pictures()


@pytest.mark.parametrize("name", RECORDED)
def test_values_and_positions_are_those_of_transformers_at_every_budget(name: str) -> None:
    pixels = read_pixels(ODD.get(name) or Image.open(picture_files()[name]))
    cut = [stack_patches([cut_patches(pixels, budget)], budget) for budget in BUDGETS]
    assert " ".join(digest(each.values[0], each.positions[0]) for each in cut) == RECORDED[name]


def test_there_are_forty_pictures() -> None:
    assert RECORDED.keys() == {*ODD, *picture_files()} and len(RECORDED) >= 40


def test_a_patch_is_48_rows_of_48_pixels_in_raster_order() -> None:
    pixels = torch.from_numpy(noise(3, 480, 576))  # 10 x 12 patches: fits 140 as it is
    cut = stack_patches([cut_patches(pixels, 140)], 140)
    assert cut.positions[0, [0, 13, 119, 120]].tolist() == [[0, 0], [1, 1], [11, 9], [-1, -1]]
    assert not cut.values[0, 120:].any()
    patch = cut.values[0, 13].reshape(SIDE, SIDE, 3)
    assert torch.equal(patch, pixels[:, 48:96, 48:96].permute(1, 2, 0) * torch.tensor(1 / 255, dtype=torch.float32))


@pytest.mark.parametrize(
    ("height", "width", "budget", "size"),
    [
        (512, 512, 280, (768, 768)),
        (100, 150, 70, (288, 480)),
        (1, 1, 70, (384, 384)),
        (1, 10_000, 70, (48, 70 * 48)),
        (10_000, 1, 1120, (1120 * 48, 48)),
        (1080, 1920, 70, (288, 528)),
    ],
)
def test_a_picture_fills_its_budget(height: int, width: int, budget: int, size: tuple[int, int]) -> None:
    assert fitted_size(height, width, budget) == size


def test_pictures_of_different_sizes_share_a_batch() -> None:
    both = [torch.from_numpy(noise(3, 40, 90)), torch.from_numpy(noise(3, 70, 30))]
    together = stack_patches([cut_patches(pixels, 70) for pixels in both], 70)
    for number, pixels in enumerate(both):
        alone = stack_patches([cut_patches(pixels, 70)], 70)
        assert torch.equal(together.values[number], alone.values[0])
        assert torch.equal(together.positions[number], alone.positions[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_turned_upright_and_an_image_is_not(orientation: int, tmp_path: Path) -> None:
    path = exif_rotated(tmp_path / "turned.jpg", orientation)
    stored = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    flip, turn = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}[orientation]
    upright = torch.rot90(stored.flip(2) if flip else stored, turn, (1, 2))
    assert torch.equal(read_pixels(path), upright)
    assert torch.equal(read_pixels(Image.open(path)), stored)


def test_a_picture_is_a_path_bytes_base64_an_open_file_an_image_or_an_array(tmp_path: Path) -> None:
    path = tmp_path / "any.png"
    Image.fromarray(smooth(30, 40)).save(path)
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    pixels = read_pixels(path)
    assert pixels.shape == (3, 30, 40) and pixels.dtype == torch.uint8
    for given in (str(path), f"file://{path}", content, io.BytesIO(content), text, f"data:image/png;base64,{text}"):
        assert torch.equal(read_pixels(given), pixels)
    array = np.array(Image.open(path))
    for given in (array, array.transpose(2, 0, 1), torch.from_numpy(array), array[:, ::-1][:, ::-1], Image.open(path)):
        assert torch.equal(read_pixels(given), pixels)
    grey = read_pixels(array[..., 0])
    assert torch.equal(grey, torch.from_numpy(array[..., 0]).expand(3, -1, -1))


def test_transparency_is_white_in_files_images_and_arrays(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((20, 20, 4), dtype=np.uint8), "RGBA")
    image.save(tmp_path / "glass.png")
    for given in (tmp_path / "glass.png", image, np.array(image)):
        assert read_pixels(given).unique().tolist() == [255]


def test_the_first_frame_of_a_moving_picture_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(smooth(20, 20) // (1 + number)) for number in range(3)]
    frames[0].save(tmp_path / "moves.png", save_all=True, append_images=frames[1:])
    assert torch.equal(read_pixels(tmp_path / "moves.png"), read_pixels(frames[0]))


def damaged(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.png"
    if kind == "truncated":
        Image.fromarray(noise(200, 200, 3)).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no picture at all\n" * 50)
    elif kind == "program":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    elif kind in ("bomb", "large", "long"):
        # Pillow refuses the first by itself. A row of the last would be widened to 48 pixels: to 3 GB.
        size = {"bomb": (30_000, 30_000), "large": (13_000, 11_000), "long": (1, 20_000_000)}[kind]
        Image.new("1", (3, 3)).save(path)
        content = path.read_bytes()
        header = b"IHDR" + struct.pack(">II", *size) + content[24:29]
        path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    elif kind == "folder":
        path.mkdir()
    return path


WAYS_OUT = {
    **dict.fromkeys(("truncated", "empty", "text", "program", "folder"), "save"),
    **dict.fromkeys(("bomb", "large", "long"), "smaller"),
    "missing": "is a path",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", WAYS_OUT)
def test_a_picture_that_cannot_be_used_is_named_with_the_way_out(kind: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"{kind}\.png.*{WAYS_OUT[kind]}") as caught:
        read_pixels(path)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    writer = os.open(tmp_path / "pipe.png", os.O_RDWR)  # or a reader would wait, and this test with it
    os.write(writer, b"x" * 100)
    for read in (read_pixels, read_sound, open_clip):
        with pytest.raises(ValueError, match=r"pipe\.png: is a pipe or a device; save the medium to a file"):
            read(tmp_path / "pipe.png")
    os.close(writer)


@pytest.mark.parametrize("name", ["palette, transparent", "RGBA", "16-bit grey", "CMYK", "bits"])
def test_pictures_are_converted_in_bands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_pixels(ODD[name])
    monkeypatch.setattr(pictures, "_BAND", 1000)
    assert torch.equal(read_pixels(ODD[name]), whole)


def test_names_as_desktops_and_addresses_write_them(tmp_path: Path) -> None:
    path = tmp_path / "my cat, 100%.png"
    Image.fromarray(smooth(30, 40)).save(path)
    pixels, encoded = read_pixels(path), base64.b64encode(path.read_bytes()).decode()
    for given in (
        path.as_uri(),
        path.as_uri().replace("file://", "file://localhost"),
        f"data:image/png;base64,{quote(encoded, safe='')}",
        f"data:image/png,{quote(path.read_bytes())}",
    ):
        assert torch.equal(read_pixels(given), pixels)


def test_open_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a" * 100)
    with (tmp_path / "a").open() as text, (tmp_path / "b").open("wb") as written:
        for given in (text, written):
            with pytest.raises(ValueError, match=r"a picture in an open file: .*open it for reading"):
                read_pixels(given)
    with pytest.raises(ValueError, match=r"a picture in an open file: .*closed"):
        read_pixels(text)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("https://example.org/cat.png", "download it"),
        ("s3://bucket/cat.png", "download it"),
        ("data:image/png;base64,????", "encode it again"),
        ("cat", "there is no such file"),
        (np.zeros((0, 5, 3), np.uint8), "shows nothing"),
        (np.zeros((5, 5, 7), np.uint8), "channels"),
        (np.zeros((2, 5, 5, 3), np.uint8), "2 or 3 dimensions"),
        (np.zeros((5, 5), bool), "convert it"),
        (np.full((5, 5, 3), np.nan, np.float32), "no finite numbers"),
        (np.zeros((1 << 21, 1, 3), np.uint8), "smaller"),
        ("", "empty path"),
        ("\ud800.png", "no file can be called so"),
        (np.array(["a"]), "convert it"),
        (42, "a picture is a path"),
        (None, "a picture is a path"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_way_out(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_pixels(given)
