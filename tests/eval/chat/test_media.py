"""Media in a conversation: files that are named or dropped, how messages keep them, and what the model gets."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
from PIL import Image
from rich.console import Console

import run
from eval.chat.commands import Chat
from eval.chat.files import dragged, files_in
from eval.chat.media import MediaOptions, MediaReader, is_message, media_of, message_of, text_of
from eval.cli.options import GenerationSettings
from eval.cli.session import Session, open_session
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config
from specdec.media import reading
from tests.support.media.clips import moving, tones, write_video
from tests.support.media.pictures import smooth
from tests.support.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_model(full_size_config("gemma-4-tiny"), None, folder)
    with threads_restored():
        yield open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=4))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a picture, a sound and a video."""
    Image.fromarray(smooth(100, 150)).save(tmp_path / "my cat.png")
    soundfile.write(tmp_path / "clip.wav", tones(16_000)[:, 0], 16_000)
    write_video(tmp_path / "talk.mp4", moving(6), sound=tones(48_000, seconds=0.25)[:, 0])
    return tmp_path


@pytest.fixture
def chat(session: Session) -> Chat:
    session.settings = replace(session.settings, temperature=0.0, seed=0)
    options = MediaOptions(image_tokens=70, frames=2)
    return Chat(session, Console(file=io.StringIO(), width=200), dashboard=True, media=options)


def said(chat: Chat) -> str:
    text: str = chat.turns.console.file.getvalue()
    return text


def test_dropped_files_are_told_from_words(files: Path) -> None:
    cat, clip = files / "my cat.png", files / "clip.wav"
    image, audio = ("image", cat), ("audio", clip)
    escaped = str(cat).replace(" ", "\\ ")
    for typed, found, rest in (
        (f"'{cat}' what is it?", [image], "what is it?"),
        (f'"{cat}"', [image], ""),
        (str(cat), [image], ""),
        (f"file://{str(cat).replace(' ', '%20')}\nwhat is it?", [image], "what is it?"),
        (f"{clip} '{cat}' both?", [audio, image], "both?"),
        (f"look at {clip}", [], f"look at {clip}"),
        (f"{files}/none.png what?", [], f"{files}/none.png what?"),
        (f"{files} what?", [], f"{files} what?"),
        ("it's 'so'", [], "it's 'so'"),
        ("x\0.png", [], "x\0.png"),
        ("a" * 5000, [], "a" * 5000),
    ):
        assert dragged(typed) == (found, rest)
    if os.name == "posix":
        assert dragged(f"{escaped} what?") == ([image], "what?")
        its = files / "it's (1).JPG"
        its.touch()
        for typed in (shlex.quote(str(its)), re.sub(r"([ '()])", r"\\\1", str(its)), f'"{its}"', its.as_uri()):
            assert dragged(f"{typed} {clip} what's it?") == ([("image", its), audio], "what's it?")
    assert files_in(str(cat)) == [cat] and files_in(f"{clip} '{cat}'") == [clip, cat]


def test_pictures_come_before_the_text_and_sound_after_it() -> None:
    picture, sound = {"type": "image", "path": "a"}, {"type": "audio", "path": "b"}
    message = message_of("what?", [sound, picture])
    assert message["content"] == [picture, {"type": "text", "text": "what?"}, sound]
    assert text_of(message) == "what?" and media_of(message) == [picture, sound]
    assert message_of("hi", []) == {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "content", [None, 3, [], ["a"], [{"type": "text"}], [{"type": "image", "path": 3}], [{"type": "x", "path": "a"}]]
)
def test_what_is_no_message_is_not_taken_from_a_file(content: Any) -> None:
    assert not is_message({"role": "user", "content": content})


def test_a_picture_goes_with_the_next_message(chat: Chat, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    honest = reading.read_pixels
    monkeypatch.setattr(reading, "read_pixels", lambda given: read.append(given) or honest(given))
    chat.line(f"/image {files / 'my cat.png'}")
    assert "my cat.png: a picture of 62 tokens, with the next message" in said(chat)
    for line in ("what is it?", "and now?"):
        chat.line(line)
    first, _, second, _ = chat.turns.messages
    part = {"type": "image", "path": str(files / "my cat.png")}
    assert first["content"] == [part, {"type": "text", "text": "what is it?"}]
    assert second["content"] == "and now?" and chat.turns.attached == []
    assert len(read) == 1, "the second question reads no file"
    assert "62 media tokens" in said(chat)
    prompt = len(chat.turns.media.inputs(chat.turns.messages[:3], chat.turns.session)[0][0])
    assert prompt > 60 and len(chat.turns.runs) == 2
    chat.line("/undo")
    chat.line("/regenerate")
    assert chat.turns.messages[0] == first


def test_what_the_model_gets(chat: Chat, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[dict[str, Any]] = []
    honest = Session.run

    def noting(self: Session, ids: Any, **options: Any) -> Any:
        got.append({"ids": ids, **options})
        return honest(self, ids, **options)

    monkeypatch.setattr(Session, "run", noting)
    chat.line(f"{files / 'talk.mp4'} '{files / 'my cat.png'}' what is said?")
    assert len(chat.turns.messages) == 2, said(chat)
    shapes = {name: tuple(got[0][name].shape) for name in ("pixel_values", "pixel_values_videos", "input_features")}
    assert shapes == {
        "pixel_values": (1, 70, 6912),
        "pixel_values_videos": (2, 70, 6912),
        "input_features": (1, 7, 640),
    }
    kinds = [part["type"] for part in chat.turns.messages[0]["content"]]
    assert kinds == ["video", "image", "text", "audio"]


def test_files_are_taken_away_again(chat: Chat, files: Path) -> None:
    for line in (f"/video {files / 'talk.mp4'}", f"/audio {files / 'clip.wav'}", "/video"):
        chat.line(line)
    assert [part["type"] for part in chat.turns.attached] == [
        "audio"
    ] and "taken away: video talk.mp4 with its sound\n" in said(chat)
    chat.line("/image")
    assert "no picture waits for the next message; /image FILE adds one" in said(chat)
    chat.line("/reset")
    assert chat.turns.attached == [] and "begins anew, without sound clip.wav" in said(chat)


def test_a_file_that_cannot_be_used_is_told_and_nothing_is_attached(chat: Chat, files: Path) -> None:
    (files / "text.png").write_text("no picture")
    for line in (f"/image {files / 'text.png'}", f"/audio {files / 'none.wav'}", f"{files / 'text.png'} what?"):
        chat.line(line)
    assert said(chat).count("text.png: cannot be read as a picture") == 2 and "none.wav" in said(chat)
    assert chat.turns.attached == [] and chat.turns.messages == []


def test_a_turn_that_fails_keeps_the_files_for_the_next(chat: Chat, files: Path) -> None:
    chat.line(f"/image {files / 'my cat.png'}")
    chat.line("<|image|> what?")  # one place more than there are pictures
    assert "places" in said(chat) and len(chat.turns.attached) == 1
    chat.line("what?")
    assert chat.turns.attached == [] and len(chat.turns.messages) == 2


def test_a_saved_conversation_reads_its_files_again(chat: Chat, files: Path) -> None:
    saved = files / "saved"
    for line in (f"/image {files / 'my cat.png'}", "what?", f"/save {saved}", "/reset", f"/load {saved}", "and now?"):
        chat.line(line)
    assert len(chat.turns.messages) == 4 and media_of(chat.turns.messages[0])
    (files / "my cat.png").unlink()
    for line in (f"/load {saved}", "and now?"):
        chat.line(line)
    assert "my cat.png: there is no such file" in said(chat) and len(chat.turns.messages) == 2


def test_a_model_of_text_alone_takes_no_files(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "text")
    with threads_restored():
        session = open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=2))
        chat = Chat(session, Console(file=io.StringIO(), width=200))
        chat.line(f"/image {files / 'my cat.png'}")
        chat.line(f"{files / 'clip.wav'} is a path")
        arguments = ["--model", str(folder), "--device", "cpu", "--threads", "1"]
        assert run.main(["chat", "--frames", "3", *arguments]) == 2
    refused = f"{folder}: a gemma3_text model, of which text alone is read here; name a model that reads pictures"
    assert f"/image: {refused}" in said(chat) and f"error: {refused}" in capsys.readouterr().err
    assert "reads text alone: the path goes as text, and the file does not" in said(chat)
    assert chat.turns.messages[0]["content"] == f"{files / 'clip.wav'} is a path"


def test_files_that_wait_are_not_lost_without_a_word(chat: Chat, files: Path) -> None:
    saved, talk = files / "saved", files / "talk.mp4"
    for line in (f"/image {files / 'my cat.png'}", "what?", f"{talk} and this?", f"/audio {files / 'clip.wav'}"):
        chat.line(line)
    chat.line(f"/save {saved}")
    assert "not in it: sound clip.wav, which still waits for the next message" in said(chat)
    talk.unlink()
    chat.turns.console.file = io.StringIO()
    chat.line(f"/load {saved}")
    loaded = said(chat)
    assert "> [video talk.mp4 with its sound] and this?" in loaded
    assert "message 1 of 4: picture my cat.png" in loaded
    assert f"put back before the next message, which reads the files again: {talk}" in loaded
    assert "sound clip.wav still waits for the next message" in loaded
    chat.line("/help")
    assert "With the next message: sound clip.wav." in said(chat)
    chat.line("/undo")
    assert "forgotten: [video talk.mp4 with its sound] and this?" in said(chat)
    chat.line("now?")
    assert [part["type"] for part in media_of(chat.turns.messages[2])] == ["audio"]


def test_a_video_counts_with_the_times_of_its_frames(chat: Chat, files: Path) -> None:
    chat.line(f"/video {files / 'talk.mp4'}")
    parts = chat.turns.attached
    with_video = chat.turns.media.inputs([message_of("what?", parts[:1])], chat.turns.session)[0].shape[1]
    alone = chat.turns.session.encode([message_of("what?", [])]).shape[1]
    assert with_video - alone == chat.turns.media.tokens(parts[:1]) == 2 * (60 + 2) + len("00:00  00:00 ")
    assert f"a video of {with_video - alone} tokens and a sound of 9 tokens" in said(chat)


def test_a_file_of_another_kind_is_sent_to_the_right_command(chat: Chat, files: Path) -> None:
    for line in (f"/audio {files / 'my cat.png'}", f"/image {files / 'talk.mp4'}", f"/video {files}"):
        chat.line(line)
    assert f"/audio: {files}/my cat.png: is a picture; name it with /image" in said(chat)
    assert f"/image: {files}/talk.mp4: is a video; name it with /video" in said(chat)
    assert f"/video: {files}: is a folder; name a file in it" in said(chat)
    chat.line(f"/image '{files / 'my cat.png'}' what?")
    assert "/image: what?: there is no such file; check the path" in said(chat)
    assert chat.turns.attached == []


def test_a_clip_with_fewer_frames_than_asked_for_is_said(chat: Chat, files: Path) -> None:
    session = chat.turns.session
    chat.turns.media = MediaReader(session.settings.model, MediaOptions(frames=7), session.tokenizer)
    chat.line(f"/video {files / 'talk.mp4'}")
    assert "(talk.mp4 has 6 frames, not 7: all of them are taken)" in said(chat)


def test_media_that_exceed_the_context_are_said_with_the_options_that_help(
    chat: Chat, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.line(f"/video {files / 'talk.mp4'}")
    monkeypatch.setattr(Session, "context", 150)
    chat.line("what?")
    assert re.search("the prompt has 1.. tokens, 146 of them for media, .* at 150; .*--frames", said(chat))
    assert len(chat.turns.attached) == 2 and not chat.turns.messages
