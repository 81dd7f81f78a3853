"""Video: which frames are taken, what they show, how their times are written, and damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from specdec.media import video
from specdec.media.sound import has_sound
from specdec.media.source import MediaSource
from specdec.media.video import MOST_FRAMES, choose_frames, open_clip, timestamps
from tests.support.media.clips import moving, tones, turn_clockwise, write_video


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "mov", "gif"])
def test_frames_of_a_file_are_those_that_transformers_reads(ending: str, tmp_path: Path) -> None:
    from transformers.video_utils import load_video

    path = tmp_path / f"clip.{ending}"
    if ending == "gif":
        pictures = [Image.fromarray(frame) for frame in moving(40)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    else:
        write_video(path, moving(40))
    clip = open_clip(path)
    assert clip.total == 40
    indices = choose_frames(clip.total, clip.rate, 7, None)
    frames = torch.stack(list(clip.frames(indices)))
    if ending != "mkv":  # its header does not say how many frames there are, and transformers then sees none
        theirs, metadata = load_video(str(path), num_frames=7)
        assert metadata.frames_indices.tolist() == indices and metadata.fps == clip.rate
        assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), theirs)
    exact = moving(40)[indices].astype(np.float32)
    assert np.abs(frames.permute(0, 2, 3, 1).numpy() - exact).mean() < 20  # the right ones: others are much further off


@pytest.mark.parametrize(
    ("total", "rate", "number", "per_second", "indices"),
    [
        (10, 25.0, 4, None, [0, 2, 5, 7]),
        (3, 25.0, 32, None, [0, 1, 2]),
        (75, 25.0, None, 1, [0, 25, 50]),
        (10, 25.0, None, 1, [0]),
        (10, 5.0, None, 60, list(range(10))),
        (4, None, None, None, [0, 1, 2, 3]),
        (30, 29.97, None, 2, [0, 15]),
    ],
)
def test_frames_are_spread_evenly(
    total: int, rate: float | None, number: int | None, per_second: float | None, indices: list[int]
) -> None:
    assert choose_frames(total, rate, number, per_second) == indices


def test_a_rate_needs_the_video_s_own() -> None:
    with pytest.raises(ValueError, match="video_metadata"):
        choose_frames(10, None, None, 1)


def test_times_are_minutes_and_seconds() -> None:
    assert timestamps([0, 61, 3665 * 25], 25.0) == ["00:00", "00:02", "61:05"]
    assert timestamps([24, 36], None) == ["00:01", "00:01"]


def test_a_frame_of_a_turned_telephone_is_upright(tmp_path: Path) -> None:
    left_half_bright = np.zeros((6, 64, 96, 3), dtype=np.uint8)
    left_half_bright[:, :, :48] = 200
    path = turn_clockwise(write_video(tmp_path / "turned.mp4", left_half_bright))
    frame = next(iter(open_clip(path).frames([0]))).float()
    assert frame.shape == (3, 96, 64)
    assert frame[:, :40].mean() > 150 and frame[:, 56:].mean() < 50  # left is on top now


def test_arrays_and_lists_of_pictures_are_videos() -> None:
    frames = moving(5)
    first_channels = torch.from_numpy(frames.transpose(0, 3, 1, 2))
    for given in (frames, first_channels, torch.from_numpy(frames), [Image.fromarray(frame) for frame in frames]):
        clip = open_clip(given)
        assert (clip.total, clip.rate) == (5, None)
        assert torch.equal(torch.stack(list(clip.frames([1, 4]))), first_channels[[1, 4]])
    grey = open_clip(frames[..., :1])
    assert torch.equal(torch.stack(list(grey.frames(range(5)))), first_channels[:, :1].repeat(1, 3, 1, 1))


def test_transparent_frames_are_put_on_white() -> None:
    glass = np.zeros((2, 10, 10, 4), dtype=np.uint8)
    for given in (glass, [Image.fromarray(frame, "RGBA") for frame in glass]):
        assert torch.stack(list(open_clip(given).frames([0, 1]))).unique().tolist() == [255]


def test_whether_there_is_sound(tmp_path: Path) -> None:
    silent = write_video(tmp_path / "silent.mp4", moving(3))
    loud = write_video(tmp_path / "loud.mp4", moving(3), sound=tones(48_000, seconds=0.1)[:, 0])
    assert [has_sound(MediaSource(str(path), path)) for path in (silent, loud)] == [False, True]


def damaged(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("once upon a time\n" * 100)
    elif kind == "sound only":
        import soundfile

        soundfile.write(path, tones(16_000), 16_000, format="WAV")
    elif kind == "without index":
        content = write_video(path, moving(30)).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "without frames":
        content = write_video(folder / "whole.mkv", moving(2)).read_bytes()
        path.write_bytes(content[: content.index(b"\x1f\x43\xb6\x75")])  # Matroska's sign of a cluster of frames
    elif kind == "cut short":
        content = write_video(folder / "whole.avi", moving(60)).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    return path


def test_more_frames_than_a_context_holds_are_refused() -> None:
    assert len(choose_frames(1 << 40, 25.0, MOST_FRAMES, None)) == MOST_FRAMES
    for number, per_second in ((MOST_FRAMES + 1, None), (None, 1), (None, None)):
        with pytest.raises(ValueError, match=r"no context holds .* ask for 4,096 or fewer"):
            choose_frames(1 << 40, 25.0, number, per_second)


def test_frames_too_large_to_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "large.mp4", moving(3))
    clip = open_clip(path)
    monkeypatch.setattr(video, "_MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"large\.mp4: has frames of 80 x 48 pixels; make them smaller"):
        open_clip(path)
    with pytest.raises(ValueError, match=r"large\.mp4: cannot be read"):  # a header that told of smaller ones
        list(clip.frames([0]))


def all_frames(path: Path) -> list[torch.Tensor]:
    clip = open_clip(path)
    return list(clip.frames(range(clip.total)))


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("empty", "save or fetch"),
        ("text", "convert"),
        ("sound only", "pass it as a sound"),
        ("without index", "convert"),
        ("without frames", "convert"),
        ("cut short", "fetch or convert"),
        ("missing", "is a path"),
    ],
)
def test_a_video_that_cannot_be_used_is_named_with_the_way_out(kind: str, way_out: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"{kind}\.mp4.*{way_out}"):
        all_frames(path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), "shows nothing"),
        (np.zeros((2, 5, 5, 9), np.uint8), "channels"),
        (np.zeros((2, 5, 5, 3), bool), "convert it"),
        (np.full((2, 5, 5, 3), np.inf), "no finite numbers"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], "differ in size"),
        ([], "a video is a path"),
        (3, "a video is a path"),
        ("https://example.org/talk.mp4", "download it"),
    ],
)
def test_what_is_no_video_is_refused_with_the_way_out(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_clip(given)
