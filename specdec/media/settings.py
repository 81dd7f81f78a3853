"""The keyword arguments of a processor's call, sorted by what they are for.

What: `sort_arguments` takes what transformers' processors take, flat (`num_frames=8`) or by medium
(`videos_kwargs={"num_frames": 8}`), and returns the tokenizer's arguments and the `MediaSettings`. `from_config` reads
what a model's processor_config.json says. Why not transformers' own merging: it lets unknown names pass, and it cannot
tell a default number of frames from one that was asked for, so that `fps=` never works there. Left out: sizes, means
and resampling methods of other models; the one value that this model has is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from transformers.video_utils import VideoMetadata

from specdec.media.pictures import BUDGETS
from specdec.media.sound import RATE
from specdec.media.video import FRAMES
from specdec.util.text import did_you_mean
from specdec.weights.metadata import Values, quote

READERS = "name a model that reads pictures, sound and video: Gemma 4 12B (google/gemma-4-12B-it)"
_MEDIA = ("images_kwargs", "videos_kwargs", "audio_kwargs")
_GROUPS = ("text_kwargs", *_MEDIA, "common_kwargs")
_TEXT = {
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_length",
    "return_special_tokens_mask",
    "return_token_type_ids",
    "stride",
    "truncation",
    "verbose",
}
_FIELDS = {
    "images_kwargs": {"max_soft_tokens": "image_tokens"},
    "videos_kwargs": {
        "max_soft_tokens": "frame_tokens",
        "num_frames": "num_frames",
        "fps": "fps",
        "do_sample_frames": "sample",
        "video_metadata": "metadata",
        "return_metadata": "return_metadata",
    },
    "audio_kwargs": {},
}
_BOTH = {"return_tensors": "return_tensors", "return_mm_token_type_ids": "return_types"}
_PATCHES = {"patch_size": 16, "pooling_kernel_size": 3}
# What this model does and other models may do otherwise.
_FIXED: dict[str, Any] = {
    **_PATCHES,
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "sampling_rate": RATE,
    "load_audio_backend": "auto",
    "timeout": None,
}


_CALL = {"text", "images", "videos", "audio"}
_TEMPLATE = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "load_audio_from_video",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "return_dict",
    "tokenize",
    "tools",
}


@dataclass(frozen=True)
class MediaSettings:
    """Describe how media become numbers, in one call."""

    image_tokens: int = 280
    frame_tokens: int = 70
    num_frames: int | None = FRAMES
    fps: float | None = None
    sample: bool = True  # pick frames; else take all
    metadata: Any = None  # of the videos, in their order
    return_metadata: bool = False
    return_types: bool = True
    return_tensors: str | None = None

    def __post_init__(self) -> None:
        for tokens in (self.image_tokens, self.frame_tokens):
            if not isinstance(tokens, Integral) or tokens not in BUDGETS:
                raise ValueError(f"max_soft_tokens is one of {', '.join(map(str, BUDGETS))}, not {tokens!r}")
        if self.num_frames is not None and not (isinstance(self.num_frames, Integral) and self.num_frames >= 1):
            raise ValueError(f"num_frames is a whole number, at least 1, not {self.num_frames!r}")
        if self.fps is not None and not (isinstance(self.fps, Real) and 0 < self.fps < math.inf):
            raise ValueError(f"fps is a number, more than 0, not {self.fps!r}")


def from_config(config: Mapping[str, Any]) -> MediaSettings:
    """Return the settings of a model's processor_config.json. Raises ValueError for those of another kind of model."""
    usual = MediaSettings()
    pictures, video, sound = (
        Values(config.get(part) or {}) for part in ("image_processor", "video_processor", "feature_extractor")
    )
    for values, name, value in (
        *((values, name, value) for values in (pictures, video) for name, value in _PATCHES.items()),
        (sound, "sampling_rate", RATE),
    ):
        if values.whole(name, 1, default=value) != value:
            raise ValueError(f"{name} in its processor_config.json is not {value}; name a Gemma 4 12B model")
    fps = video.number("fps", 1e-3, 1e3) if video.has("fps") else None
    return MediaSettings(
        image_tokens=pictures.whole("max_soft_tokens", 1, default=usual.image_tokens),
        frame_tokens=video.whole("max_soft_tokens", 1, default=usual.frame_tokens),
        num_frames=None if fps is not None else video.whole("num_frames", 1, default=FRAMES),
        fps=fps,
    )


def to_config(settings: MediaSettings) -> dict[str, Any]:
    """Return the processor_config.json of `settings`, which transformers reads as well."""
    frames = {"num_frames": settings.num_frames} if settings.fps is None else {"num_frames": None, "fps": settings.fps}
    return {
        "processor_class": "Gemma4UnifiedProcessor",
        "image_processor": {
            "image_processor_type": "Gemma4UnifiedImageProcessor",
            "max_soft_tokens": settings.image_tokens,
            **_PATCHES,
        },
        "video_processor": {
            "video_processor_type": "Gemma4UnifiedVideoProcessor",
            "max_soft_tokens": settings.frame_tokens,
            **_PATCHES,
            **frames,
        },
        "feature_extractor": {
            "feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor",
            "sampling_rate": RATE,
        },
    }


def sort_arguments(
    defaults: MediaSettings, given: Mapping[str, Any], variables: Collection[str] = ()
) -> tuple[dict[str, Any], MediaSettings]:
    """Return the tokenizer's arguments and the settings of a call with the keyword arguments `given`.

    `variables`: what the chat template takes besides, for hints. Raises ValueError for a name that no medium has, for a
    value that this model does not have, and for two values of one argument.
    """
    text: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for groups, name, value in _each(given):
        homes = [_FIELDS[group][name] for group in groups if name in _FIELDS.get(group, ())]
        if name in _TEXT:
            if "text_kwargs" in groups:  # media are always padded as the model needs
                _put(text, name, value)
        elif name in _BOTH:
            fields[_BOTH[name]] = value
        elif name in _FIXED:
            if value is not None and value != _FIXED[name]:
                raise ValueError(f"{name} is {_FIXED[name]!r} for this model, not {value!r}; leave it out")
        elif homes:
            for home in homes:
                _put(fields, home, value)
        else:
            raise ValueError(_refusal(groups, name, variables))
    fields = {name: value for name, value in fields.items() if value is not None}
    if {"num_frames", "fps"} <= fields.keys():
        raise ValueError("num_frames and fps both say how many frames; leave one out")
    if "fps" in fields:
        fields["num_frames"] = None
    elif "num_frames" in fields:
        fields["fps"] = None
    return text, replace(defaults, **fields)


def _refusal(groups: tuple[str, ...], name: str, variables: Collection[str]) -> str:
    """Return what to do about an argument `name` that none of `groups` takes."""
    if name in _TEMPLATE:
        return f"{name} is an argument of apply_chat_template itself; pass it there, outside of processor_kwargs"
    if name in _CALL:
        return f"{name} goes into the parts of the messages, or as {name}= to the processor's call; leave it out here"
    where = groups[0] if len(groups) == 1 else "a processor"
    if name in _GROUPS:
        return f"{where} takes no {name} inside; pass {name} beside it"
    homes = [group for group, fields in _FIELDS.items() if name in fields]
    if homes:
        return f"{where} takes no {name}; pass it in {' or '.join(homes)}"
    fields = {field for fields in _FIELDS.values() for field in fields}
    known = {*_TEXT, *_BOTH, *_FIXED, *_GROUPS, *_TEMPLATE, *_CALL, *fields, *variables}
    other = ", and neither does the chat template" if variables and len(groups) > 1 else ""
    return f"{where} takes no {name}{other}.{did_you_mean(name, known)}"


def _each(given: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield each argument with the groups that it is for: a flat one is for all that know it."""
    for key, value in given.items():
        if key in ("text_kwargs", *_MEDIA):
            for name, inner in arguments_of(key, value):
                yield (key,), name, inner
        elif key == "common_kwargs":
            for name, inner in arguments_of(key, value):
                yield ("text_kwargs", *_MEDIA), name, inner
        else:
            yield ("text_kwargs", *_MEDIA), key, value


def arguments_of(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Return the pairs of the argument `key`, a dict or None. Raises ValueError for anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} is a dict of arguments, not {type(value)}")
    return (value or {}).items()


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    if name in values:
        raise ValueError(f"{name} is given twice, flat and by medium; leave one out")
    values[name] = value


def with_metadata(given: Any, count: int) -> list[VideoMetadata | None]:
    """Return the metadata of each of `count` videos: objects or dicts, flat or nested as conversations are.

    Raises ValueError for others, and for those of another number of videos.
    """
    if given is None:
        return [None] * count
    items = list(_flat(given))
    if len(items) != count:
        raise ValueError(f"video_metadata describes {len(items)} videos, and {count} are given; describe each of them")
    return [_metadata(item) for item in items]


def _metadata(given: Any) -> VideoMetadata | None:
    """Return the metadata of a video, the caller's own unchanged. Raises ValueError for what no video has."""
    if given is None:
        return None
    try:
        found = VideoMetadata(**given) if isinstance(given, Mapping) else replace(given)
        about: tuple[Any, Any, Any] = (found.total_num_frames, found.fps, found.frames_indices)
        total, fps, indices = about
        right = isinstance(total, Integral) and int(total) > 0
        right &= fps is None or (isinstance(fps, Real) and 0 < float(fps) < math.inf)
        right &= indices is None or all(isinstance(index, Integral) and int(index) >= 0 for index in indices)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"video_metadata is a dict, or an object of transformers, for each video ({error})") from None
    if not right:
        raise ValueError(
            f"video_metadata has {total!r} frames and {fps!r} a second, and takes those at {quote(indices)}; numbers "
            "of frames are whole and not negative, and a rate is more than 0"
        )
    return found


def _flat(given: Any) -> Iterator[Any]:
    for item in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(item, (list, tuple)):
            yield from _flat(item)
        else:
            yield item
