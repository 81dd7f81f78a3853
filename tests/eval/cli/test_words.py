"""Counts and sizes in words."""

from __future__ import annotations

import pytest

from eval.cli.words import byte_size


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (1_900_000, "1.9 MB"),
        (999_999_999, "1000.0 MB"),
        (24_100_000_000, "24.10 GB"),
    ],
)
def test_a_size_has_a_unit_that_fits(count: int, words: str) -> None:
    assert byte_size(count) == words
