"""Names that are mistyped, text that is none, and the package's own names, which load torch when they are used."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

import specdec
from specdec.util.text import check_text, did_you_mean, printable


@pytest.mark.parametrize(
    ("word", "meant"),
    [("smolm2-135m-instruct", "smollm2-135m-instruct"), ("SmolLM2-135M-instruct", "smollm2-135m-instruct")],
)
def test_a_near_name_is_offered(word: str, meant: str) -> None:
    assert did_you_mean(word, ["gemma-3-270m", "smollm2-135m-instruct"]) == f" Did you mean {meant}?"


@pytest.mark.parametrize("word", ["qwen", "", "smollm2" * 10_000])
def test_nothing_is_offered_where_nothing_is_near(word: str) -> None:
    assert did_you_mean(word, ["gemma-3-270m", "smollm2-135m-instruct"]) == ""


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_loads_nothing_heavy() -> None:
    modules = "specdec, specdec.util.atomic, specdec.util.terminal, specdec.util.text, specdec.weights.hub.paths"
    python(f"import sys, {modules}; assert not {{'torch', 'transformers'}} & {{*sys.modules}}")


def test_every_public_name_is_there() -> None:
    assert {*specdec.__all__} <= {*dir(specdec)}
    assert specdec.__version__ == metadata.version("specdec-mtp")
    for name in {*specdec.__all__} - {"__version__"}:
        assert getattr(specdec, name).__module__.startswith("specdec")
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = specdec.lode  # type: ignore[attr-defined]


def test_load_is_the_function_also_beside_its_module() -> None:
    python("import specdec.load; assert callable(specdec.load); from specdec import load; assert load is specdec.load")


def test_text_is_text() -> None:
    check_text("é 語 \U0001f600 \x1b", "it")
    with pytest.raises(ValueError, match=r"^it is not text: character 3 is '\\ud83d', half of a surrogate pair"):
        check_text("ab\ud83d", "it")
    with pytest.raises(ValueError, match=r"^it is not text: line 2, character 2 is '\\udc80'"):
        check_text("abc\nd\udc80", "it")
    assert printable("ab\ud83d") == "ab\ud83d"
