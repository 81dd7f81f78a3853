"""Conversations with media: the parts of messages that are pictures, sound and video.

What: `take_media` returns a conversation in which such a part says only its type, as chat templates expect it, and the
media in the order of their parts. A part is written as transformers takes it (`{"type": "image", "url": ...}`) or as
OpenAI's interface does (`image_url`, `input_audio`, `video_url`). `template_variables` tells which arguments a chat
template has a use for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from specdec.media.sound import has_sound
from specdec.media.source import as_source
from specdec.util.text import did_you_mean

_TYPES = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "input_audio": "audio",
    "audio_url": "audio",
    "video": "video",
    "video_url": "video",
}
_BASE64 = ("base64", "data")
_PLACES = {"path", "url", "base64"}  # where parts keep a medium, and no other parts anything


@dataclass
class ConversationMedia:
    """Hold the media of a conversation, in the order of their parts."""

    image: list[Any] = field(default_factory=list)
    audio: list[Any] = field(default_factory=list)
    video: list[Any] = field(default_factory=list)


def list_conversations(given: Any) -> tuple[list[Any], bool]:
    """Return the conversations of a call, one or a list of them, and whether it was a list.

    Raises ValueError for what is no conversation: a list of messages, each a dict with a role and a content.
    """
    first = given[0] if isinstance(given, (list, tuple)) and given else None
    batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
    found = list(given) if batched else [given]
    for conversation in found:
        messages = getattr(conversation, "messages", conversation)
        if not isinstance(messages, (list, tuple)) or not messages or not all(map(_is_message, messages)):
            raise ValueError('a conversation is a list of messages like {"role": "user", "content": "..."}')
    return found, batched


def _is_message(given: Any) -> bool:
    return not isinstance(given, (str, bytes, int, float, list, tuple, type(None)))


def take_media(conversation: Iterable[Any], sound_of_videos: bool = False) -> tuple[list[Any], ConversationMedia]:
    """Return the conversation with bare parts, and its media. None stands for a part that names no medium.

    `sound_of_videos` adds a part for the sound of each video that has a sound track, at the end of the video's message.
    """
    media = ConversationMedia()
    return [
        _bare(message, media, sound_of_videos) for message in getattr(conversation, "messages", conversation)
    ], media


def _bare(message: Any, media: ConversationMedia, sound_of_videos: bool) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
        return message
    parts, videos = [], []
    for part in message["content"]:
        kind = _TYPES.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        if kind is None:
            if isinstance(part, Mapping) and part.keys() & _PLACES:
                medium_of(part)  # raises: a template would drop it without a word
            parts.append(part)
            continue
        medium = _medium(part, kind)
        getattr(media, kind).append(medium)
        videos += [medium] if kind == "video" else []
        parts.append({"type": kind})
    if sound_of_videos:
        for video in videos:
            source = as_source(video, "video")
            if source is not None and has_sound(source):
                media.audio.append(source)
                parts.append({"type": "audio"})
    return {**message, "content": parts}


def medium_of(part: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the type of a part, "image", "audio" or "video", and its medium. Raises ValueError for another part."""
    kind = _TYPES.get(str(part.get("type")))
    if kind is None:
        name = str(part.get("type"))
        raise ValueError(f"{name!r} is no type of media; write one of {', '.join(_TYPES)}.{did_you_mean(name, _TYPES)}")
    medium = _medium(part, kind)
    if medium is None:
        raise ValueError(missing_medium(kind))
    return kind, medium


def missing_medium(kind: str) -> str:
    """Return the message about a part of the type `kind` without a medium."""
    what = {"image": "picture", "audio": "sound"}.get(kind, kind)
    return f'a part of type "{kind}" names no {what}; write {{"type": "{kind}", "path": ...}}'


def _medium(part: Mapping[str, Any], kind: str) -> Any:
    for key in (kind, "url", "path", *_BASE64, part["type"]):
        value = part.get(key)
        if isinstance(value, Mapping):  # OpenAI's: {"url": ...} or {"data": ..., "format": ...}
            return _medium({**value, "type": kind}, kind)
        if value is not None:
            encoded = key in _BASE64 and isinstance(value, str) and not value.startswith("data:")
            return f"data:;base64,{value}" if encoded else value
    return None


class _Generation(Extension):
    """Read `{% generation %}`, which chat templates put around an assistant's words, as what stands inside."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes up to `{% endgeneration %}`: jinja2 calls this at the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def template_variables(template: str) -> frozenset[str]:
    """Return the names of the variables that a chat template reads and does not set. Raises jinja2's errors."""
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))
