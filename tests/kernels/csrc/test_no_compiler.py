"""What one is told where the native library was not built, because no compiler was there: once, and what helps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import specdec
from specdec import kernels
from specdec.load import _warn_of_slowness

ROOT = Path(__file__).parents[3]


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels.libraries, "_compiled", "no native library was built here")
    kernels.choose("native")
    _warn_of_slowness.cache_clear()
    yield
    monkeypatch.undo()
    kernels.choose(os.environ.get("SPECDEC_KERNELS", "native"))
    _warn_of_slowness.cache_clear()


def load(folder: Path, quantize: str | None = "int4") -> list[str]:
    """What loading warns of."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        specdec.load(folder, drafter=None, quantize=quantize, device="cpu")
    assert all(warning.filename == __file__ for warning in heard), "a warning names the line that called load()"
    return [str(warning.message) for warning in heard]


def test_loading_says_once_why_it_is_slow_and_what_helps(folder: Path, no_library: None) -> None:
    assert kernels.active() == "torch reference: no native library was built here"
    assert load(folder, None) == []  # torch multiplies what is not in blocks, with or without the library
    (said,) = load(folder)
    for part in ("a hundred times slower", "no native library was built here", "install g++ or clang++"):
        assert part in said
    assert said.endswith(f"pip install --no-deps -e {ROOT}")
    assert load(folder) == []


def test_whoever_chose_the_reference_is_not_told(folder: Path, no_library: None) -> None:
    kernels.choose("reference")
    assert load(folder) == []
    with pytest.raises(ValueError, match=r"native:avx2 cannot be used: no native library .* install g\+\+"):
        kernels.choose("native:avx2")


def test_an_installed_package_names_the_command_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels.native, "__file__", str(tmp_path / "specdec" / "kernels" / "native.py"))
    assert "pip install --force-reinstall --no-deps . (in the folder" in kernels.native.how_to_build()


def test_a_command_says_it_in_one_line(folder: Path, tmp_path: Path) -> None:
    for part in ("specdec", "drafter", "eval"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("_native.*", "__pycache__"))
    for file in ("run.py", "setup.py"):
        shutil.copy(ROOT / file, tmp_path)
    asked = ["generate", "hello", "--model", str(folder), "--quantize", "int8", "--drafter", "none"]
    ours = ("SPECDEC_KERNELS", "SPECDEC_REQUIRE_NATIVE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "run.py", *asked, "--max-new-tokens", "2", "--threads", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "native" in line]
    assert told == done.stderr.splitlines()[:1], done.stderr
    assert told[0].startswith("warning: quantised weights run on plain torch")
    assert told[0].endswith(f"pip install --no-deps -e {tmp_path}")


def test_windows_is_told_which_compiler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.native.sys, "platform", "win32")
    said = kernels.native.how_to_build()
    assert "clang++ or the g++ of MinGW-w64" in said and "Microsoft's compiler does not do" in said
    assert said.endswith(f'pip install --no-deps -e "{ROOT}"')  # its shell knows no single quotes
