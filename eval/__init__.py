"""Commands for users and for proofs: bench, exactness, answer, chat. Imports nothing heavy: help is instant.

`python -m eval.NAME` imports this package before the module NAME, and with that torch: a mistyped model is told here.
"""

from __future__ import annotations

import sys


def _check_model(words: list[str]) -> None:
    """End the command with a sentence where `--model` names nothing."""
    from specdec.weights.hub.paths import local_path

    for word, after in zip(words, [*words, ""][1:], strict=True):
        if word == "--model" or word.startswith("--model="):
            try:
                local_path(after if word == "--model" else word.partition("=")[2])
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)


if sys.argv[:1] == ["-m"]:  # so while Python looks for the module that it was told to run
    _check_model(sys.argv[1:])
