"""Pictures and sound in requests: from parts of messages to soft tokens in a prompt.

What: `read_content` reads a message's parts as OpenAI's and Anthropic's clients write them; `read_media` lets the
model's processor read them, and `put_media` puts their soft tokens into a prompt. A medium comes within the request, as
a data URI or in base64: nothing is opened or fetched for a client. Left out: video, and how finely a picture is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.media.processor import Processor
from specdec.media.sound import FRAME
from specdec.server.body.objects import Fields
from specdec.server.errors import bad_request, too_long
from specdec.server.formats import FieldError

MOST = 64  # of a request; each picture takes 8 MB while the prompt is read
_TYPES = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
}
_WORDS = {"image": "picture", "audio": "sound"}

Part = dict[str, Any]


def read_content(fields: Fields, name: str) -> Any:
    """Return the content `name` of a message, in which a picture is a part `{"type": "image", "image": URI, "where":
    ...}`, and a sound such a part of the type "audio". Raises ApiError for one that does not come in the request."""
    given = fields.raw(name)
    if not isinstance(given, list):
        return given
    return [_part(part, f"{fields.path(name)}[{i}]") for i, part in enumerate(given)]


def _part(given: Any, where: str) -> Any:
    kind = _TYPES.get(str(given.get("type"))) if isinstance(given, dict) else None
    return given if kind is None else media_part(given, kind, where)


def media_part(part: Part, kind: str, where: str) -> Part:
    """Return a part that is a picture or a sound, `kind` "image" or "audio", as `read_content` does."""
    names = ("source", str(part.get("type")), f"{kind}_url", kind)
    found = next((part[name] for name in names if part.get(name) is not None), None)
    inner = found if isinstance(found, dict) else {"url": found}
    data = inner.get("data")
    uri = inner.get("url") if data is None else data
    if isinstance(uri, str) and data is not None and not uri.startswith("data:"):
        uri = f"data:;base64,{uri}"
    if not isinstance(uri, str) or not uri.startswith("data:"):
        raise bad_request(
            f"{where}: the {_WORDS[kind]} must come within the request, as a data URI or in base64; nothing is "
            "opened or fetched for a client",
            where,
        )
    return {"type": kind, kind: uri, "where": where}


def media_parts(messages: Sequence[Any]) -> list[Part]:
    """Return the parts of messages that are pictures and sound, in their order."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") in _WORDS and "where" in part]


@dataclass(frozen=True)
class Media:
    """Hold the media of a prompt: the soft tokens of each picture and each sound, and a model's inputs besides token
    ids."""

    pictures: Sequence[list[int]] = ()
    sounds: Sequence[list[int]] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)


def read_media(parts: Sequence[Part], processor: Processor | None, context: int) -> Media:
    """Return the media of `parts`, for a model with so many tokens of context and this processor (None: it reads text
    alone). Raises FieldError for a medium that cannot be used, ApiError for more than the context takes."""
    if not parts:
        return Media()
    if processor is None:
        kind = _WORDS[parts[0]["type"]]
        raise FieldError(parts[0]["where"], f"is a {kind}, and this model reads text alone")
    if len(parts) > MOST:
        raise FieldError(
            parts[MOST]["where"], f"is one of {len(parts)} pictures and sounds; at most {MOST} can be sent"
        )
    read: dict[str, list[Any]] = {"image": [], "audio": []}
    tokens = 0
    for part in parts:
        kind = part["type"]
        try:
            medium = processor.prepare({"type": kind, kind: part[kind]})[kind]
        except (ValueError, ImportError) as error:  # the latter names the library that is missing here
            raise FieldError(part["where"], str(error)) from error
        read[kind].append(medium)
        tokens += len(medium.values) if kind == "image" else -(-len(medium) // FRAME)
        if tokens >= context:
            raise too_long(tokens, context)
    pictures, sounds = read["image"], read["audio"]
    text = processor.image_token * len(pictures) + processor.audio_token * len(sounds)
    inputs = processor(
        text=text, images=pictures or None, audio=sounds or None, return_tensors="pt", add_special_tokens=False
    )
    runs = _runs(inputs.pop("input_ids")[0].tolist(), processor)
    assert len(runs) == len(parts), "a medium has soft tokens, and a token after them"
    inputs.pop("mm_token_type_ids", None)  # of this text, not of the prompt
    return Media(runs[: len(pictures)], runs[len(pictures) :], inputs)


def _runs(ids: Sequence[int], processor: Processor) -> list[list[int]]:
    """Cut token ids after the end of each medium."""
    ends = {processor.tokenizer.convert_tokens_to_ids(token) for token in (processor.eoi_token, processor.eoa_token)}
    runs: list[list[int]] = [[]]
    for token in ids:
        runs[-1].append(token)
        if token in ends:
            runs.append([])
    return runs[:-1]


def put_media(prompt: list[int], media: Media, processor: Processor | None) -> list[int]:
    """Return a prompt in which the soft tokens of each medium stand at its place, where the template has one token.

    Raises FieldError when the template has more or fewer places than there are media.
    """
    if processor is None or not (media.pictures or media.sounds):
        return prompt
    places = {processor.image_token_id: iter(media.pictures), processor.audio_token_id: iter(media.sounds)}
    counts = [prompt.count(processor.image_token_id), prompt.count(processor.audio_token_id)]
    if counts != [len(media.pictures), len(media.sounds)]:
        raise FieldError(
            "messages", f"the model's chat template has {counts[0]} places for pictures and {counts[1]} for sound here"
        )
    return [soft for token in prompt for soft in (next(places[token]) if token in places else (token,))]
