"""What a medium holds, whatever it was given as: files of another kind, texts, covers of albums, damaged containers."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import soundfile
from PIL import Image

from specdec.media.container import OtherKindError
from specdec.media.pictures import read_pixels
from specdec.media.sound import read_sound
from specdec.media.video import open_clip
from tests.support.media.clips import moving, tones, write_video
from tests.support.media.pictures import smooth

READ: dict[str, Any] = {"picture": read_pixels, "sound": read_sound, "video": open_clip}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    picture, tone = Image.fromarray(smooth(60, 90)), tones(48_000, seconds=0.2)[:, 0]
    for name in ("cat.png", "cat.jpg", "still.gif"):
        picture.save(folder / name)
    picture.save(folder / "moving.gif", save_all=True, append_images=[Image.fromarray(smooth(60, 90) // 2)])
    soundfile.write(folder / "clip.wav", tone, 48_000)
    write_video(folder / "talk.mp4", moving(6), sound=tone)
    write_video(folder / "mute.mp4", moving(6))
    (folder / "clip.png").write_bytes((folder / "clip.wav").read_bytes())
    (folder / "notes.txt").write_text("hello world\n" * 500)
    (folder / "text.mp4").write_text("hello")
    (folder / "text.png").write_text("hello world\n" * 500)
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>')
    album(folder / "album.flac", picture, tone)
    return folder


def album(path: Path, cover: Image.Image, tone: Any) -> None:
    """Write a FLAC file with the picture of a cover, as music is sold."""
    encoded, sound = io.BytesIO(), io.BytesIO()
    cover.save(encoded, "PNG")
    soundfile.write(sound, tone, 48_000, format="FLAC")
    content, picture, kind = sound.getvalue(), encoded.getvalue(), b"image/png"
    block = struct.pack(">II", 3, len(kind)) + kind + struct.pack(">6I", 0, *cover.size, 24, 0, len(picture)) + picture
    end = 4 + 4 + int.from_bytes(content[5:8], "big")  # of the first block, which says how the samples are stored
    first = bytes([content[4] & 0x7F]) + content[5:end]
    header = bytes([6 | content[4] & 0x80]) + len(block).to_bytes(3, "big")
    path.write_bytes(content[:4] + first + header + block + content[end:])


@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("cat.png", "sound", "picture"),
        ("cat.png", "video", "picture"),
        ("cat.jpg", "video", "picture"),
        ("still.gif", "video", "picture"),
        ("moving.gif", "sound", "picture"),
        ("clip.wav", "picture", "sound"),
        ("clip.png", "picture", "sound"),
        ("clip.wav", "video", "sound"),
        ("album.flac", "video", "sound"),
        ("album.flac", "picture", "sound"),
        ("talk.mp4", "picture", "video"),
    ],
)
def test_a_medium_of_another_kind_is_named_as_what_it_is(files: Path, name: str, given: str, kind: str) -> None:
    with pytest.raises(OtherKindError) as caught:
        READ[given](files / name)
    assert str(caught.value) == f"{files / name}: is a {kind}, and was given as a {given}; pass it as a {kind}"
    assert (caught.value.given, caught.value.kind) == (given, kind)


@pytest.mark.parametrize(
    ("name", "given", "size"),
    [
        ("still.gif", "picture", (60, 90)),
        ("moving.gif", "picture", (60, 90)),
        ("moving.gif", "video", (2, 60, 90)),
        ("talk.mp4", "sound", (3200,)),
        ("album.flac", "sound", (3200,)),
        ("mute.mp4", "video", (6, 48, 80)),
    ],
)
def test_a_medium_of_two_kinds_is_read_as_either(files: Path, name: str, given: str, size: tuple[int, ...]) -> None:
    found = READ[given](files / name)
    if given == "picture":
        assert tuple(found.shape[1:]) == size
    elif given == "video":
        assert (found.total, found.height, found.width) == size
    else:  # 0.2 s at 16 kHz; a codec pads
        assert size[0] <= len(found) < 1.5 * size[0]


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("mute.mp4", "sound", "has no sound track"),
        ("notes.txt", "video", "is a text, and no video; name another file"),
        ("notes.txt", "sound", "is a text, and no sound"),
        ("notes.txt", "picture", "its format is unknown"),
        ("text.png", "picture", "its format is unknown"),
        ("drawing.svg", "picture", "its format is unknown"),
        (
            "text.mp4",
            "video",
            "cannot be read as a video (Invalid data found when processing input); convert it to",
        ),
    ],
)
def test_a_file_of_no_kind_is_named_once_with_the_way_out(files: Path, name: str, given: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        READ[given](files / name)
    said = str(caught.value)
    assert said.startswith(f"{files / name}: ")
    assert said.count(str(files)) == 1 and "Errno" not in said and "\n" not in said
