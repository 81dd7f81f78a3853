"""Trained drafters: heads that propose the backbone's next tokens from its own hidden state and K/V; and reading them,
and models that draft, from disk.

The public names are imported when somebody first asks for one: `drafter.settings` loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdec.util.lazy import lazy

if TYPE_CHECKING:
    from drafter.files.bundled import bundled_head, largest_bundled_head
    from drafter.files.checkpoint import load_drafter
    from drafter.files.drafters import open_drafter, stored_bytes, weights_state
    from drafter.files.find import heads_in
    from drafter.mtp_drafter import MTPDrafter

__all__ = [
    "MTPDrafter",
    "bundled_head",
    "heads_in",
    "largest_bundled_head",
    "load_drafter",
    "open_drafter",
    "stored_bytes",
    "weights_state",
]

__getattr__ = lazy(
    __name__,
    {
        "files.bundled": ("bundled_head", "largest_bundled_head"),
        "files.checkpoint": ("load_drafter",),
        "files.drafters": ("open_drafter", "stored_bytes", "weights_state"),
        "files.find": ("heads_in",),
        "mtp_drafter": ("MTPDrafter",),
    },
)
