"""The options of `--learn` and of `run.py learned`. Nothing heavy is imported here, as in `eval.cli`."""

from __future__ import annotations

import argparse

from eval.cli.options import add_json_option, whole_number

LIMIT = 64_000_000  # bytes; some 12 million tokens
LEARNED_TEXT = """\
Show what chat and serve have kept with --learn: how many conversations of which model, of what time, and how large.
They lie in the cache folder, readable by you alone, and never leave this machine: `train --from-use` adapts a draft
head to them, and --erase deletes them."""


def add_learn_options(parser: argparse.ArgumentParser) -> None:
    """Add `--learn` and `--learn-limit`."""
    group = parser.add_argument_group("learning from use")
    group.add_argument(
        "--learn",
        action="store_true",
        help="keep conversations in the cache folder, for you alone, so that train --from-use can adapt the draft head "
        "to what you ask. Nothing leaves this machine; texts with pictures or sound, and answers that were stopped, "
        "are not kept. `learned` shows and erases them",
    )
    group.add_argument(
        "--learn-limit",
        type=amount,
        default=LIMIT,
        metavar="SIZE",
        help="what they may take on disk, of all models together; the oldest go first (default 64MB)",
    )


def amount(text: str) -> int:
    """Parse an amount of bytes above 0, like 64MB: an argparse type."""
    from specdec.memory.plan import parse_bytes

    try:
        found = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount; write it like 64MB")
    return found


def add_learned_options(learned: argparse.ArgumentParser) -> None:
    """Add the options of `run.py learned`."""
    learned.description = LEARNED_TEXT
    learned.add_argument("model", nargs="?", metavar="MODEL", help="of this model alone, as the list calls it")
    learned.add_argument(
        "--texts", type=whole_number(1), metavar="N", help="print the newest N conversations of each model"
    )
    learned.add_argument("--erase", action="store_true", help="delete them")
    learned.add_argument("--yes", action="store_true", help="do not ask, with --erase")
    add_json_option(learned, "the list")
