"""Conversations with media of every kind, alone, mixed, over several turns and in a batch."""

from __future__ import annotations

from typing import Any

from PIL import Image

from tests.support.media.clips import moving, tones
from tests.support.media.pictures import smooth


def conversations() -> dict[str, Any]:
    image, other = Image.fromarray(smooth(90, 140)), Image.fromarray(smooth(50, 40, 4), "RGBA")
    sound = tones(16_000, seconds=0.3)[:, 0]
    video = moving(40, 60, 90)
    part = {
        "image": {"type": "image", "image": image},
        "other": {"type": "image", "image": other},
        "sound": {"type": "audio", "audio": sound},
        "short": {"type": "audio", "audio": sound[:100]},
        "video": {"type": "video", "video": video},
    }

    def chat(*names: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [part.get(name, {"type": "text", "text": name}) for name in names]}]

    return {
        "text": chat("hello"),
        "picture": chat("image", "what?"),
        "all": chat("image", "and", "video", "or", "sound"),
        "turns": [*chat("image", "first"), {"role": "assistant", "content": "one"}, *chat("other", "short", "second")],
        "batch": [
            chat("only text"),
            chat("image", "other", "x"),
            chat("a", "sound"),
            chat("short"),
            chat("video", "b"),
        ],
    }
