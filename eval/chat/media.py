"""Pictures, sound and video in a conversation: files that a person names, and what the model gets of them.

What: a message with media has a list of parts as its content: `{"type": "image", "path": ...}` and `{"type": "text",
...}`, which a saved conversation keeps as they are. `MediaReader` reads each file once for all questions about it.
`dragged` finds paths at the beginning of what was typed, where terminals write a file that is dropped on them. Order:
pictures and videos before the text, sound after it, as the model card of Gemma 4 advises.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

import specdec
from eval.cli.session import Session
from specdec.media.processor import Processor
from specdec.media.sound import FRAME, has_sound
from specdec.media.source import MediaSource, file_path
from specdec.util.atomic import user_path
from specdec.util.text import check_text

KINDS = {"image": "picture", "audio": "sound", "video": "video"}
_SUFFIXES = {
    "image": ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .ppm",
    "audio": ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .aiff .aif .au",
    "video": ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ogv .3gp .wmv",
}
_KIND_OF = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_QUOTED = re.compile(r"""(["'])(.+?)\1(?=\s|$)""")
# As a shell writes a word: pieces in quotation marks, escaped characters, and all others.
_PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)""", re.DOTALL)
_SHELL = re.compile(rf"(?:{_PIECE.pattern}|[^\s\\'\"])+(?=\s|$)", re.DOTALL)

Part = dict[str, str]
Message = dict[str, Any]
"""{"role": ..., "content": text, or a list of parts}."""


@dataclass(frozen=True)
class MediaOptions:
    """How much of a context media take: soft tokens of a picture, frames of a video, and whether videos are heard.

    None: as the model's own settings say.
    """

    image_tokens: int | None = None
    frames: int | None = None
    sound: bool = True


class MediaReader:
    """Read the media of a conversation with the model of `session`."""

    def __init__(self, session: Session, options: MediaOptions | None = None) -> None:
        self.session, self.options = session, options or MediaOptions()
        self._read: dict[tuple[str, str], dict[str, Any]] = {}  # parts whose medium has been read

    @cached_property
    def processor(self) -> Processor:
        """Return the model's processor. Raises ValueError: the model takes text alone, or a library is missing."""
        try:
            return specdec.load_processor(self.session.settings.model, self.session.tokenizer)
        except ImportError as error:
            raise ValueError(str(error)) from error

    @property
    def welcome(self) -> bool:
        """Tell whether the model takes media."""
        try:
            return self.processor is not None
        except ValueError:
            return False

    def parts(self, kind: str, path: Path) -> list[Part]:
        """Read a file, and return the parts of a message that stand for it: a video's sound is a part of its own.

        Raises ValueError: the file cannot be used, or the model takes no media.
        """
        parts = [{"type": kind, "path": str(path.absolute())}]
        self._prepared(parts[0])
        if kind == "video" and self.options.sound and has_sound(MediaSource(str(path), path)):
            parts.append({**parts[0], "type": "audio"})
            self._prepared(parts[1])
        return parts

    def tokens(self, parts: Sequence[Part]) -> int:
        """Return how many soft tokens media take."""
        return sum(_soft_tokens(self._prepared(part)) for part in parts if part["type"] in KINDS)

    def inputs(self, messages: Sequence[Message]) -> tuple[Tensor, dict[str, Any]]:
        """Return the token ids [1, n] of a conversation, ready for the answer, and the model's other inputs.

        Raises ValueError: a file cannot be used, or the chat template refuses the messages.
        """
        if all(isinstance(message["content"], str) for message in messages):
            return self.session.encode(messages), {}
        for message in messages:
            check_text(text_of(message), f"the {message['role']}'s message")
        try:
            inputs = self.processor.apply_chat_template(
                [{**message, "content": self._whole(message["content"])} for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=self._arguments,
            )
        except ValueError:
            raise
        except Exception as error:  # templates raise jinja2's kinds, and what their authors thought of
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        return inputs["input_ids"], {
            name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")
        }

    def _whole(self, content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [self._prepared(part) if part["type"] in KINDS else part for part in content]

    def _prepared(self, part: Part) -> dict[str, Any]:
        key = (part["type"], part["path"])
        if key not in self._read:
            self._read[key] = self.processor.prepare({**part, "path": Path(part["path"])}, **self._arguments)
        return self._read[key]

    @property
    def _arguments(self) -> dict[str, Any]:
        pictures, videos = {"max_soft_tokens": self.options.image_tokens}, {"num_frames": self.options.frames}
        return {"images_kwargs": pictures, "videos_kwargs": videos}


def message_of(text: str, parts: Sequence[Part]) -> Message:
    """Return the user's message of a text and media; without media its content is the text itself."""
    if not parts:
        return {"role": "user", "content": text}
    seen = [part for part in parts if part["type"] != "audio"]
    heard = [part for part in parts if part["type"] == "audio"]
    return {"role": "user", "content": [*seen, {"type": "text", "text": text}, *heard]}


def text_of(message: Mapping[str, Any]) -> str:
    """Return what a message says in words."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def media_of(message: Mapping[str, Any]) -> list[Part]:
    """Return the parts of a message that are media."""
    return [] if isinstance(message["content"], str) else [part for part in message["content"] if "path" in part]


def is_message(message: Any) -> bool:
    """Tell whether `message`, read from a file, has a content as messages have it here."""
    if not isinstance(message, dict):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and bool(content) and all(map(_is_part, content)))


def files_in(text: str) -> list[Path]:
    """Return the paths in a text of nothing but paths, each bare, in quotation marks, or with escaped spaces.

    Raises ValueError for a word that no file can be called.
    """
    whole = user_path(text)
    return [whole] if whole.is_file() else [file_path(word) for word, _ in _words(text)]


def dragged(text: str) -> tuple[list[tuple[str, Path]], str]:
    """Return the media files that a message begins with, each with its kind, and the rest of the message."""
    if kind := _kind(text):  # a name with spaces, as it is
        return [(kind, file_path(text))], ""
    found: list[tuple[str, Path]] = []
    for word, rest in _words(text):
        kind = _kind(word)
        if kind is None:
            break
        found.append((kind, file_path(word)))
        text = rest
    return found, text


def _words(text: str) -> Iterator[tuple[str, str]]:
    """Yield each word of `text` as a terminal writes a path, without its quotation marks, and the text behind it."""
    while text := text.strip():
        if os.name == "posix" and (found := _SHELL.match(text)):
            word = _PIECE.sub(_unquoted, found[0])
        elif found := _QUOTED.match(text):
            word = found[2]
        else:
            word = text.split(maxsplit=1)[0]
        text = text[found.end() if found else len(word) :]
        yield word, text.strip()


def _unquoted(piece: re.Match[str]) -> str:
    """Return what a piece of a shell's word says: in quotation marks, in double ones, or behind a backslash."""
    single, double, escaped = piece.groups()
    return single or escaped or re.sub(r'\\(["\\$`])', r"\1", double or "")


def _kind(word: str) -> str | None:
    """Return the kind of the media file at the path `word`; None where there is no such file."""
    kind = _KIND_OF.get(os.path.splitext(word)[1].lower())
    try:
        return kind if kind and file_path(word).is_file() else None
    except (OSError, ValueError):
        return None


def _soft_tokens(part: Mapping[str, Any]) -> int:
    if part["type"] == "image":
        return len(part["image"].values)
    if part["type"] == "video":
        return sum(len(frame.values) for frame in part["video"].frames)
    return -(-len(part["audio"]) // FRAME)


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    needed = "text" if part.get("type") == "text" else "path" if part.get("type") in KINDS else None
    return needed is not None and isinstance(part.get(needed), str)
