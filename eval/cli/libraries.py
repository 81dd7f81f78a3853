"""The import of torch, transformers and what stands on them: most of the time until a command has loaded its model."""

from __future__ import annotations

import atexit
import gc

from specdec.util.lazy import import_uncollected


def import_libraries() -> None:
    """Import torch, transformers and `specdec.load`, and keep Python's collector from ever looking at them."""
    import_uncollected("specdec.load")
    gc.freeze()
    # Or what the libraries clear at the end would still be there, of which some (Triton) complain on the terminal.
    atexit.register(gc.unfreeze)
