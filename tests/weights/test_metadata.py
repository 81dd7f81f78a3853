"""Values of files: each kind is taken or refused by name, and errors are one printable line with the file's name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.weights.metadata import Values, foreign, naming, one_line, quote, read_object

STRANGE: list[Any] = [None, "7", 7.0, math.nan, [7], {"a": 7}, True, -1, 11, 2**70]


@pytest.mark.parametrize("value", STRANGE)
def test_only_whole_numbers_within_bounds_are_whole(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'m\.heads'"):
        Values({"m.heads": value}, "m.").whole("heads", 0, 10)


@pytest.mark.parametrize("value", [7, np.int64(7), torch.tensor(7)])
def test_whole_numbers_of_other_libraries_are_numbers(value: Any) -> None:
    assert Values({"heads": value}).whole("heads", 0, 10) == 7


@pytest.mark.parametrize("value", ["1.0", math.nan, math.inf, -math.inf, [1.0], True, 2.5, -(10**400)])
def test_only_finite_numbers_within_bounds_are_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match="'eps' must be a number from 0 to 1"):
        Values({"eps": value}).number("eps", 0, 1)


def test_kinds() -> None:
    values = Values({"n": 3, "x": 1, "t": "a", "f": False, "l": [1, 2], "s": ["a"], "o": {"n": 4}, "none": None})
    assert values.number("x", 0, 2) == 1.0 and type(values.number("x", 0, 2)) is float
    assert (values.text("t"), values.flag("f"), values.wholes("l"), values.texts("s")) == ("a", False, [1, 2], ["a"])
    assert values.inner("o").whole("n") == 4
    assert not values.has("none") and values.whole("none", default=5) == 5
    for call in (
        lambda: values.text("n"),
        lambda: values.flag("n"),
        lambda: values.wholes("s"),
        lambda: values.texts("l"),
        lambda: values.wholes("l", length=3),
        lambda: values.inner("l"),
        lambda: values.sequence("t"),
        lambda: values.whole("missing"),
    ):
        with pytest.raises(ValueError, match=r"'(n|s|l|t|missing)'"):
            call()


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a": ' * 10_000, "\ufeff\x00"])
def test_a_file_that_holds_no_object(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: .*JSON"):
        read_object(file)
    with pytest.raises(ValueError, match=r"none\.json: .*No such file"):
        read_object(tmp_path / "none.json")


def test_the_file_is_named_once() -> None:
    with pytest.raises(ValueError, match=r"^a/b: no heads$"), naming("a/b"), naming("a/b"):
        raise ValueError("no heads")
    with pytest.raises(ValueError, match=r"^a/b: x\\x1b\[31my z$"), naming("a/b"):
        raise ValueError("x\x1b[31my\nz")
    with pytest.raises(OSError, match="away"), naming("a/b"):
        raise OSError("away")


class Panic(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RecursionError("x"), Panic("x"), OSError(2, "x")])
def test_errors_of_other_libraries_become_one(error: BaseException) -> None:
    with pytest.raises(ValueError, match=r"^f: cannot be read \(.*x.*\); copy it$"), foreign("f", "copy it"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), MemoryError()])
def test_what_is_nobodys_fault_passes(error: BaseException) -> None:
    with pytest.raises(type(error)), foreign("f"):
        raise error


def test_what_is_shown_is_short_and_printable() -> None:
    for value in ("a\x1b[2J" * 1000, "\u202e", "\ud800", list(range(10**5)), {"a": 1}, 10**6000, math.nan, b"\x1b"):
        text = quote(value)
        assert text.isprintable() and len(text) <= 80
    assert one_line("a\x1bb\nc\x9b") == "a\\x1bb c\\x9b"
    assert len(one_line("a" * 10**6)) < 2100


def test_values_of_an_object() -> None:
    class Config:
        heads = 3

    assert Values(Config()).whole("heads") == 3
    assert json.dumps(Values(Config()).find("none")) == "null"
