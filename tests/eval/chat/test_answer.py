"""`run.py generate` with pictures, sound and video: its record, how an answer ended, and what is refused beforehand."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from PIL import Image

import run
from eval.chat import answer as answering
from eval.cli import options
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config
from specdec.media import video
from tests.support.media.clips import moving, tones, write_video
from tests.support.media.pictures import smooth
from tests.support.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with three models: one that reads media, one of text alone, and a file without its embedders."""
    folder = tmp_path_factory.mktemp("models")
    write_model(full_size_config("gemma-4-tiny"), None, folder / "media")
    make_folder(folder / "text")
    write_model(full_size_config("gemma-4-tiny"), None, folder / "alone", gguf="q4_0")
    (folder / "alone" / "mmproj-model.gguf").unlink()
    with threads_restored():
        yield folder


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command runs, with a picture, a sound and a video."""
    Image.fromarray(smooth(100, 150)).save(tmp_path / "cat.png")
    soundfile.write(tmp_path / "clip.wav", tones(16_000)[:, 0], 16_000)
    write_video(tmp_path / "talk.mp4", moving(6), sound=tones(48_000, seconds=0.25)[:, 0])
    (tmp_path / "empty.wav").touch()
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(model: Path, *arguments: str) -> int:
    return run.main(["generate", "what?", *arguments, "--model", str(model), "--device", "cpu", "--threads", "1"])


def record(model: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert generate(model, *arguments, "--json", "-") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_record_has_files_and_options(models: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media = ("--image", "cat.png", "--audio", "clip.wav", "--video", "talk.mp4", "--frames", "3")
    found = record(models / "media", capsys, *media, "--image-tokens", "140", "--max-new-tokens", "3")
    rows = [(part["type"], Path(part["path"]).name, part["soft_tokens"], part["tokens"]) for part in found["media"]]
    assert rows == [
        ("image", "cat.png", 126, 128),
        ("video", "talk.mp4", 180, 180 + 3 * 2 + len("00:00  00:00  00:00 ")),
        ("audio", "talk.mp4", 7, 9),
        ("audio", "clip.wav", 13, 15),
    ]
    assert [part.get("frames") for part in found["media"]] == [None, 3, None, None]
    assert found["media_options"] == {"image_tokens": 140, "frames": 3, "no_sound": False}
    found = record(models / "media", capsys, "--video", "talk.mp4", "--no-sound", "--max-new-tokens", "3")
    assert [part["type"] for part in found["media"]] == ["video"]
    assert found["media_options"] == {"image_tokens": 280, "frames": 32, "fps": None, "no_sound": True}
    found = record(models / "media", capsys, "--max-new-tokens", "3")
    assert found["media"] == [] and found["media_options"] is None


def test_an_answer_says_how_it_ended(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ended(*arguments: str) -> tuple[str, int, str]:
        assert generate(models / "media", *arguments, "--json", "-") == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        note = [line for line in captured.err.splitlines() if line.startswith("[cut after")]
        return found["finish_reason"], len(found["tokens"]), "".join(note)

    cut = "[cut after 4 tokens, the limit; a larger --max-new-tokens gives longer answers]"
    assert ended("--max-new-tokens", "4") == ("length", 4, cut)
    sample = ("--temperature", "3", "--top-k", "0", "--seed", "8")
    reason, count, note = ended("--max-new-tokens", "400", *sample)
    assert (reason, note) == ("stop", "") and count < 400
    assert ended("--max-new-tokens", str(count), *sample) == ("stop", count, "")  # its last token is the end


def test_an_answer_that_fills_the_context_says_so(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "text", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    assert generate(tmp_path / "short", "--raw", "--max-new-tokens", "90") == 0
    assert "[cut after 27 tokens, where the context of 32 tokens ends]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image", "gone.png"), "--image gone.png: there is no such file; check the path"),
        (("--audio", "gone.wav"), "--audio gone.wav: there is no such file"),
        (("--video", "dir/gone.mp4"), "--video dir/gone.mp4: there is no such file"),
        (("--image", "cat.png", "--image", "dir"), "--image dir: is a folder; name a file in it"),
        (("--audio", "empty.wav"), "--audio empty.wav: is empty; save or fetch it again"),
        (("--raw", "--image", "cat.png"), "--raw continues text alone"),
        (("--frames", "4"), "--frames is about a video, and there is none; add --video FILE, or leave --frames out"),
        (("--frames", "4", "--image", "cat.png"), "--frames is about a video"),
        (("--image-tokens", "70", "--video", "talk.mp4"), "--image-tokens is about a picture, and there is none"),
        (("--no-sound", "--audio", "clip.wav"), "--no-sound is about a video"),
        (("--audio", "cat.png"), "--audio cat.png: is a picture; name it with --image"),
        (("--image", "talk.mp4"), "--image talk.mp4: is a video; name it with --video"),
        (("--video", "clip.wav"), "--video clip.wav: is a sound; name it with --audio"),
    ],
)
def test_files_and_options_are_refused_before_the_model_loads(
    models: Path,
    files: Path,
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(answering, "open_session")
    assert generate(models / "media", *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {words}") and len(errors.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other pipes")
def test_a_pipe_is_not_waited_for(models: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    assert generate(models / "media", "--video", "pipe") == 2
    assert "--video pipe: is a pipe or a device; save what comes from it to a file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--frames", "5000", "--video", "a"), ("--image", "https://example.org/a.png")])
def test_what_no_file_and_no_context_has_is_refused_at_once(
    models: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate(models / "media", *arguments)
    assert stopped.value.code == 2
    words = {"--frames": "must be at most 4096, got 5000", "--image": "nothing is fetched from the web; download it"}
    assert words[arguments[0]] in capsys.readouterr().err
    assert options.FRAMES == video.MOST_FRAMES


def test_a_clip_with_fewer_frames_than_asked_for_is_said(
    models: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(models / "media", "--video", "talk.mp4", "--frames", "7", "--max-new-tokens", "2") == 0
    assert "[talk.mp4 has 6 frames, not 7: all of them are taken]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "text",
            "text: a gemma3_text model, of which text alone is read here; name a model that reads pictures",
        ),
        ("alone", "alone: has no weights that read a picture; a .gguf file needs its mmproj-*.gguf in the same folder"),
    ],
)
def test_a_model_that_reads_no_pictures_is_named(
    models: Path, files: Path, model: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(models / model, "--image", "cat.png") == 2
    assert f"error: {models}/{words}" in capsys.readouterr().err
