"""The parser of commands: argparse's, with the right spelling of what was mistyped.

It lies apart from the options, because `run.py --help` needs nothing else.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from specdec.util.text import did_you_mean, printable


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fill the paragraphs of a description to the width of the terminal, and leave lines that are indented, such as
    commands, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(self._paragraph(part, width, indent) for part in text.strip("\n").split("\n\n"))

    def _paragraph(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        if any(line.startswith("  ") for line in lines):
            return "\n".join(indent + line for line in lines)
        return textwrap.fill(
            text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )


class Parser(argparse.ArgumentParser):
    """Parse as argparse does, suggest the right spelling of a mistyped choice or option, and print no control character
    of it.

    A command refuses what is not its own itself, with its own usage: argparse would hand the rest up to the parser of
    all commands, which knows no option of theirs.
    """

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Return the parsed `args` and no others: what the parser does not know ends the process with exit code 2."""
        words = sys.argv[1:] if args is None else list(args)
        # Before argparse, which would first complain of the required option that was mistyped.
        if unknown := self._unknown_option(words):
            hint = did_you_mean(unknown, self._option_string_actions)
            self.error(f"unrecognized arguments: {unknown}{hint and '.'}{hint}")
        found, surplus = super().parse_known_args(words, namespace)
        if surplus:
            self.error(f"unrecognized arguments: {' '.join(surplus)}")
        return found, []

    def _unknown_option(self, words: Sequence[str]) -> str | None:
        """Return the first of `words` that begins with -- and is no option here, nor the beginning of one."""
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return None  # behind it are a prompt's words, or those of a command
            name = word.partition("=")[0]
            is_option = word.startswith("--") and " " not in word  # with a space argparse takes it for a value
            if is_option and not any(known.startswith(name) for known in self._option_string_actions):
                return name
        return None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        """Print the usage and `message` on stderr, and end with exit code 2."""
        super().error(printable(message))
