"""Pictures, sound and video in a conversation: how messages keep them, and what the model gets of them.

What: a message with media has a list of parts as its content: `{"type": "image", "path": ...}` and `{"type": "text",
...}`, which a saved conversation keeps as they are. `MediaReader` reads each file once for all questions about it.
Order: pictures and videos before the text, sound after it, as the model card of Gemma 4 advises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

import specdec
from eval.chat.files import KINDS, check_file
from eval.cli.session import Session
from specdec.media.container import OtherKindError
from specdec.media.processor import Processor
from specdec.media.sound import FRAME, has_sound
from specdec.media.source import MediaSource
from specdec.util.text import check_text

Part = dict[str, str]
Message = dict[str, Any]
"""{"role": ..., "content": text, or a list of parts}."""


@dataclass(frozen=True)
class MediaOptions:
    """Describe how much of a context media take: soft tokens of a picture, frames of a video, and whether videos are
    heard.

    None: as the model's own settings say.
    """

    image_tokens: int | None = None
    frames: int | None = None
    sound: bool = True


class MediaReader:
    """Read the media of a conversation for the model `model`, which need not be loaded.

    `tokenizer` is the model's, where it has been loaded before.
    """

    def __init__(
        self, model: str, options: MediaOptions | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.model, self.options, self.tokenizer = model, options or MediaOptions(), tokenizer
        self._read: dict[tuple[str, str], dict[str, Any]] = {}  # parts whose medium has been read

    @cached_property
    def processor(self) -> Processor:
        """Return the model's processor. Raises ValueError: the model takes text alone, or a library is missing."""
        try:
            return specdec.load_processor(self.model, self.tokenizer)
        except ImportError as error:
            raise ValueError(str(error)) from error

    @property
    def welcome(self) -> bool:
        """Tell whether the model takes media."""
        try:
            return self.processor is not None
        except ValueError:
            return False

    def parts(self, kind: str, path: Path, sign: str = "--") -> list[Part]:
        """Read a file, and return the parts of a message that stand for it: a video's sound is a part of its own.

        `sign`: what stands before a kind where the person names the file, as in --image or /image. Raises ValueError:
        the file cannot be used, or the model takes no media.
        """
        processor = self.processor  # first: no other file would do for a model of text alone
        check_file(path)
        parts = [{"type": kind, "path": str(path.absolute())}]
        try:
            self._read[kind, parts[0]["path"]] = processor.prepare({"type": kind, "path": path}, **self._arguments)
        except OtherKindError as error:
            right = next(name for name, what in KINDS.items() if what == error.kind)
            raise ValueError(f"{path}: is a {error.kind}; name it with {sign}{right}") from None
        if kind == "video" and self.options.sound and has_sound(MediaSource(str(path), path)):
            parts.append({**parts[0], "type": "audio"})
            self._prepared(parts[1])
        return parts

    def tokens(self, parts: Sequence[Part]) -> int:
        """Return how many tokens of the context media take: soft tokens, their marks, and the times of frames."""
        return sum(self.processor.count_tokens(self._prepared(part)) for part in parts if part["type"] in KINDS)

    def record(self, part: Part) -> dict[str, Any]:
        """Return a part with what the model gets of it, in JSON types: tokens, soft tokens, and frames of a video."""
        read = self._prepared(part)
        frames = {"frames": len(read["video"].frames)} if part["type"] == "video" else {}
        return {**part, "tokens": self.tokens([part]), "soft_tokens": _soft_tokens(read), **frames}

    def options_record(self) -> dict[str, Any]:
        """Return the options of all media as they were in effect, in JSON types."""
        asked, usual = self.options, self.processor.settings
        frames = {"frames": usual.num_frames, "fps": usual.fps} if asked.frames is None else {"frames": asked.frames}
        return {"image_tokens": asked.image_tokens or usual.image_tokens, **frames, "no_sound": not asked.sound}

    def shortage(self, parts: Sequence[Part]) -> str:
        """Return a sentence about a video with fewer frames than were asked for; "" without such a video."""
        for part in parts:
            if part["type"] == "video" and self.options.frames is not None:
                name, found = Path(part["path"]).name, len(self._prepared(part)["video"].frames)
                if found < self.options.frames:
                    return f"{name} has {found:,} frames, not {self.options.frames:,}: all of them are taken"
        return ""

    def inputs(self, messages: Sequence[Message], session: Session) -> tuple[Tensor, dict[str, Any]]:
        """Return the token ids [1, n] of a conversation, ready for the answer, and the other inputs of the model of
        `session`.

        Raises ValueError: a file cannot be used, the chat template refuses the messages, or they are longer than the
        context.
        """
        if all(isinstance(message["content"], str) for message in messages):
            return session.encode(messages), {}
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
        length = inputs["input_ids"].shape[1]
        if length >= session.context:
            media = self.tokens([part for message in messages for part in media_of(message)])
            raise ValueError(
                f"the prompt has {length:,} tokens, {media:,} of them for media, and the context ends at "
                f"{session.context:,}; take fewer or shorter media, a smaller --frames or --image-tokens, or --no-sound"
            )
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


def check_embedder(session: Session, parts: Sequence[Part]) -> None:
    """Raise a ValueError when the loaded model has no weights for media of these kinds, whatever its tokenizer has."""
    embedder = session.model.decoder.media
    for part in parts:
        needed = embedder and (embedder.audio if part["type"] == "audio" else embedder.vision)
        if needed is None:
            raise ValueError(
                f"{session.settings.model}: has no weights that read a {KINDS[part['type']]}; a .gguf file needs its "
                "mmproj-*.gguf in the same folder, and a folder the tensors of its embedders"
            )


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


def name_files(parts: Sequence[Part]) -> str:
    """Return the kinds and names of media in words, a video and its sound as one."""
    seen = {part["path"] for part in parts if part["type"] == "video"}
    heard = {part["path"] for part in parts if part["type"] == "audio"}
    return ", ".join(
        f"{KINDS[part['type']]} {Path(part['path']).name}"
        + (" with its sound" if part["type"] == "video" and part["path"] in heard else "")
        for part in parts
        if part["type"] != "audio" or part["path"] not in seen
    )


def quote_message(message: Mapping[str, Any]) -> str:
    """Return what a message says, behind the names of its media in brackets."""
    media = media_of(message)
    return f"[{name_files(media)}] {text_of(message)}" if media else text_of(message)


def is_message(message: Any) -> bool:
    """Tell whether `message`, read from a file, has a content as messages have it here."""
    if not isinstance(message, dict):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and bool(content) and all(map(_is_part, content)))


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
