"""Heads that come with the package, a folder each in `heads/`, found by the fingerprint of their backbone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from drafter.files.head import HEAD_FILE

HEADS = Path(__file__).parent.parent / "heads"


@cache
def _heads() -> dict[str, Path]:
    found = {}
    for config in sorted(HEADS.glob("*/config.json")):
        found[str(json.loads(config.read_text(encoding="utf-8"))["backbone"]["fingerprint"])] = config.parent
    return found


def bundled_head(fingerprint: str) -> Path | None:
    """Return the folder of the bundled head for the backbone with `fingerprint` (`Decoder.fingerprint`), or None."""
    return _heads().get(fingerprint)


def largest_bundled_head() -> int:
    """Return the bytes of the largest bundled head; 0 when none is bundled."""
    return max((file.stat().st_size for file in HEADS.glob(f"*/{HEAD_FILE}")), default=0)
