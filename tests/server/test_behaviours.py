"""The table of behaviours names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import tests.server

BEHAVIOURS = 36


def test_every_behaviour_has_a_test_that_is_there() -> None:
    table, folder = str(tests.server.__doc__), Path(tests.server.__file__).parent
    numbers = [int(found) for found in re.findall(r"^ {4,5}(\d+)  ", table, re.MULTILINE)]
    assert numbers == [*range(1, BEHAVIOURS + 1)]
    for entry in re.split(r"^ {4,5}\d+  ", table, flags=re.MULTILINE)[1:]:
        named = re.findall(r"([\w/]+\.py)::(\w+)", entry)
        assert named, entry
        for file, name in named:
            assert f"\ndef {name}(" in (folder / file).read_text(encoding="utf-8"), f"{file}::{name}"
