"""Media of a call, as transformers lets them be nested: one, a list of them, or a list for each text.

Each function returns the media in order, and how many belong to each text where the nesting says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Grouped = tuple[list[Any], list[int] | None]


def group_pictures(given: Any) -> Grouped:
    """Return the pictures in `given`: an array of four dimensions holds several."""
    return _grouped([list(_pictures(item)) for item in given] if _is_nested(given) else None, list(_pictures(given)))


def group_videos(given: Any) -> Grouped:
    """Return the videos in `given`: a list of pictures is one video, and so are paths in a list three levels deep."""
    nested = _is_nested(given) and not any(map(_are_frames, given))
    return _grouped([list(_videos(item, 1)) for item in given] if nested else None, list(_videos(given)))


def list_sounds(given: Any) -> list[Any]:
    """Return the sounds in `given`: a list of numbers is one sound. As in transformers, no text has its own list."""
    return list(_sounds(given))


def _grouped(groups: list[list[Any]] | None, flat: list[Any]) -> Grouped:
    return flat, None if groups is None else [len(group) for group in groups]


def _is_nested(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(item, (list, tuple)) for item in given)


def _pictures(given: Any) -> Iterator[Any]:
    if isinstance(given, (list, tuple)):
        for item in given:
            yield from _pictures(item)
    elif getattr(given, "ndim", 0) == 4:
        yield from given
    elif given is not None:
        yield given


def _videos(given: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(given, (list, tuple)):
        if _are_frames(given) or (given and depth == 2):
            yield given
        else:
            for item in given:
                yield from _videos(item, depth + 1)
    elif getattr(given, "ndim", 0) == 5:
        yield from given
    elif given is not None:
        yield [given] if _is_frame(given) else given


def _sounds(given: Any) -> Iterator[Any]:
    if isinstance(given, (list, tuple)) and not (given and isinstance(given[0], (int, float))):
        for item in given:
            yield from _sounds(item)
    elif given is not None:
        yield given


def _are_frames(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(map(_is_frame, given))


def _is_frame(given: Any) -> bool:
    return getattr(given, "ndim", 0) == 3 or hasattr(given, "getbands")
