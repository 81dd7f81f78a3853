"""Sound as numbers: every format, rate and number of channels as transformers' `load_audio` reads them, and damage."""

from __future__ import annotations

import base64
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from specdec.media import sound
from specdec.media.sound import FRAME, RATE, cut_frames, read_sound
from tests.support.media.clips import moving, tones, write_video


def whole_reading(path: Path) -> np.ndarray:
    """Read a sound at once, as librosa does, through which transformers reads."""
    with soundfile.SoundFile(path) as file:
        samples, rate = file.read(dtype="float32"), file.samplerate
    mixed = samples.T.mean(axis=0) if samples.ndim > 1 else samples
    if rate == RATE:
        return mixed
    count = int(np.ceil(len(mixed) * (float(RATE) / rate)))
    resampled = soxr.resample(mixed, rate, RATE, quality="soxr_hq")[:count]
    return np.pad(resampled, (0, count - len(resampled)))


FORMATS = {
    "wav": {"subtype": "PCM_16"},
    "24.wav": {"subtype": "PCM_24"},
    "float.wav": {"subtype": "FLOAT"},
    "flac": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {},
}


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16_000, 2), (48_000, 1), (44_100, 2), (22_050, 6)])
def test_every_format_is_read_as_transformers_reads_it(
    ending: str, rate: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 48_000 if ending == "opus" and rate > 16_000 else rate
    channels = min(channels, 2) if ending in ("mp3", "opus") else channels
    path = tmp_path / f"tone.{ending}"
    soundfile.write(path, tones(rate, channels), rate, **FORMATS[ending])
    monkeypatch.setattr(sound, "_BLOCK", 1000)  # several blocks
    samples = read_sound(path)
    assert samples.dtype == np.float32 and np.array_equal(samples, whole_reading(path))
    assert 7900 <= len(samples) <= 9500 and samples.std() > 0.02


def test_sound_is_also_bytes_base64_or_an_array(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tones(RATE), RATE)
    content, samples = path.read_bytes(), read_sound(path)
    text = base64.b64encode(content).decode()
    for given in (str(path), content, path.open("rb"), f"data:audio/wav;base64,{text}", text):
        assert np.array_equal(read_sound(given), samples)
    for given in (samples, samples.astype(np.float64), torch.from_numpy(samples), samples.tolist()):
        assert np.array_equal(read_sound(given), samples)
    assert read_sound(np.array([1, -2], dtype=np.int16)).tolist() == [1.0, -2.0]  # as it is


@pytest.mark.parametrize("ending", ["m4a", "mp4", "mkv"])
def test_what_soundfile_does_not_know_is_read_by_pyav(ending: str, tmp_path: Path) -> None:
    tone = tones(48_000, seconds=1)[:, 0]
    path = write_video(tmp_path / f"clip.{'mp4' if ending == 'm4a' else ending}", moving(24), sound=tone)
    if ending == "m4a":
        path = path.rename(tmp_path / "clip.m4a")
    samples = read_sound(path)
    expected = soxr.resample(tone, 48_000, RATE)
    assert abs(len(samples) - RATE) < 2000
    spectra = [np.abs(np.fft.rfft(each, RATE)) for each in (samples, expected)]
    assert spectra[0].argmax() == spectra[1].argmax() == 220
    loudness = [np.abs(each[4000:12_000]).max() for each in (samples, expected)]
    assert loudness[0] == pytest.approx(loudness[1], rel=0.1)


@pytest.mark.parametrize(("count", "frames"), [(1, 1), (640, 1), (641, 2), (480_000, 750)])
def test_frames_hold_640_samples_and_the_last_ends_in_silence(count: int, frames: int) -> None:
    samples = np.arange(1, count + 1, dtype=np.float32)
    cut = cut_frames(samples)
    assert cut.shape == (frames, FRAME) == (math.ceil(count / FRAME), FRAME)
    assert torch.equal(cut.flatten()[:count], torch.from_numpy(samples)) and not cut.flatten()[count:].any()


@pytest.mark.parametrize("ending", ["mp3", "wav"])
def test_a_sound_that_is_cut_short_ends_there(ending: str, tmp_path: Path) -> None:
    """Its header still tells of the whole: what memory held must not be heard in place of what is missing."""
    path = tmp_path / f"cut.{ending}"
    soundfile.write(path, tones(44_100, 2, seconds=4), 44_100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    samples = read_sound(path)
    assert np.array_equal(samples, whole_reading(path)) and RATE < len(samples) < 3 * RATE


def test_memory_holds_what_is_heard_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros((10 * 192_000, 8), np.int16), 192_000)  # 61 MB as floats
    tracemalloc.start()
    heard = read_sound(path).nbytes
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert heard == 10 * RATE * 4 and most < 4 * heard + 8 * sound._BLOCK * 4


def test_features_are_those_of_transformers() -> None:
    from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor

    clips = [tones(RATE, seconds=seconds)[:, 0] for seconds in (0.5, 0.04, 1e-3)]
    theirs = Gemma4UnifiedAudioFeatureExtractor()(clips, return_tensors="pt")
    for features, mask, clip in zip(theirs["input_features"], theirs["input_features_mask"], clips, strict=True):
        assert torch.equal(features[mask], cut_frames(read_sound(clip)))


def test_silence_is_a_sound(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.flac", np.zeros(44_100), 44_100)
    assert read_sound(tmp_path / "silence.flac").tolist() == [0.0] * RATE


def damaged(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp3"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("la la la\n" * 500)
    elif kind == "folder":
        path.mkdir()
    elif kind == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    elif kind == "truncated":
        soundfile.write(path, tones(44_100, 2, seconds=3), 44_100, format="FLAC")
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "no samples":
        soundfile.write(path, np.zeros((0, 1)), 16_000, format="WAV")
    elif kind == "not finite":
        soundfile.write(path, np.full(100, np.nan, np.float32), 16_000, format="WAV", subtype="FLOAT")
    elif kind == "video":
        write_video(path.with_suffix(".mp4"), moving(5)).rename(path)
    elif kind == "unknown codec":
        soundfile.write(path, tones(RATE), RATE, format="WAV")
        content = path.read_bytes()
        path.write_bytes(content[:20] + b"\x99\x00" + content[22:])
    elif kind == "playlist":
        path.write_text("ffconcat version 1.0\nfile other.wav\n")
        soundfile.write(folder / "other.wav", tones(RATE), RATE)
    return path


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("empty", "save or fetch"),
        ("text", "convert"),
        ("picture", "leave its sound out"),
        ("truncated", "convert"),
        ("no samples", "record"),
        ("not finite", "record"),
        ("video", "leave its sound out"),
        ("unknown codec", "unknown codec; convert"),
        ("playlist", "convert"),
        ("folder", "is a folder; save"),
        ("missing", "is a path"),
    ],
)
def test_a_sound_that_cannot_be_used_is_named_with_the_way_out(kind: str, way_out: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"{kind}\.mp3.*{way_out}") as caught:
        read_sound(path)
    assert str(caught.value).count("cannot be read") <= 1


def test_a_sound_longer_than_any_context_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sound, "_LONGEST", 3600)
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(4000), 1)
    with pytest.raises(ValueError, match=r"long\.flac: lasts longer than 1 hours; cut it"):
        read_sound(path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((2, 100), np.float32), "mix it down"),
        (np.zeros(0, np.float32), "mix it down"),
        (np.array([np.inf]), "finite"),
        (np.array([1e300]), "finite"),
        (np.array(["a"]), "a sound is a path"),
        (None, "a sound is a path"),
        ([[1.0], [1.0, 2.0]], "one number for each sample"),
        ("http://example.org/a.wav", "download it"),
    ],
)
def test_what_is_no_sound_is_refused_with_the_way_out(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_sound(given)
