"""JSON that strangers send: what cannot be followed or written again is refused."""

from __future__ import annotations

import json

import pytest

from specdec.util.json_text import DEEPEST, parse_json


@pytest.mark.parametrize("value", [None, {"a": [1, 2.5, "é😀", True, {}]}, [], "x", 10**30, [[]] * 500])
def test_json_is_read(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text) == parse_json(text.encode()) == value
    assert parse_json("\ufeff1".encode()) == 1


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "NaN",
            "[Infinity]",
            "-Infinity",
            "1e999",
            '"\\ud800"',
            '{"\\uDC00": 1}',
            b'"\xed\xa0\x80"',
            b"\xff",
        ),
        *('"x"'.encode("utf-16"), '{"a": 1}'.encode("utf-32"), "1" * 5000, "[" * 100_000, '{"a":' * 100_000),
    ],
)
def test_what_no_program_can_write_again_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_bounded(before: str, after: str) -> None:
    parse_json(before * DEEPEST + "1" + after * DEEPEST)
    with pytest.raises(ValueError, match="deep"):
        parse_json(before * (DEEPEST + 1) + "1" + after * (DEEPEST + 1))
