"""The bits of every instruction set, from a program that calls a built library as it is: all entries, odd shapes.

What is right is the reference's affair (the other files here): here nothing may depend on the set. `.ci/emulate` runs
the same program on processors that this machine is not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specdec.kernels import native, sources
from tests.support.native.kernel_paths import AVAILABLE
from tests.support.native.needs_native import needs_library

HERE = Path(__file__).parents[1] / "support" / "native"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
_library = native.load()

needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler is here")


def compile_cpp(target: Path, source: Path, *options: str) -> Path:
    """Compile `source` to `target`, quickly."""
    assert COMPILER is not None
    # A preloaded sanitizer is meant for the library that is tested.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [COMPILER, "-std=c++17", "-ffp-contract=off", *options, str(source), "-o", str(target)]
    subprocess.run(command, check=True, env=environment)
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_cpp(tmp_path_factory.mktemp("hashes") / "kernel_hashes", HERE / "kernel_hashes.cpp", "-ldl")


def hashes(program: Path, library: Path, instruction_set: str) -> list[str]:
    """Return a line for each case: what it is, and the hash of its results."""
    done = subprocess.run([program, library, instruction_set], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == f"set {instruction_set}"
    assert len(lines) > 400
    return lines


@needs_library
@needs_compiler
def test_every_set_has_the_bits_of_the_portable_code(program: Path) -> None:
    assert isinstance(_library, native.Native)
    expected = hashes(program, _library.path, "portable")
    for name in AVAILABLE:
        assert hashes(program, _library.path, name) == expected, name


@needs_library
@needs_compiler
def test_a_set_that_the_cpu_lacks_is_not_used(program: Path) -> None:
    assert isinstance(_library, native.Native)
    done = subprocess.run([program, _library.path, "sse9"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "kernel_hashes: this CPU has no set sse9\n"


@needs_compiler
@pytest.mark.skipif("avx2" not in AVAILABLE, reason="this CPU has no AVX2")
def test_avx_vnni_has_the_same_bits_with_its_one_instruction_done_by_others(program: Path, tmp_path: Path) -> None:
    options = ("-Og", "-fPIC", "-shared", "-pthread", "-w", "-include", str(HERE / "pretended_vnni.h"))
    library = compile_cpp(tmp_path / "pretended.so", sources.FOLDER / "native.cpp", *options)
    assert hashes(program, library, "avx-vnni") == hashes(program, library, "portable")


def test_every_set_of_the_library_has_a_word_that_chooses_it() -> None:
    table = (sources.FOLDER / "dispatch.h").read_text(encoding="utf-8").partition("kSets[]")[2]
    names = re.findall(r'^ {4}\{"([\w-]+)", ', table, re.MULTILINE)
    assert sorted(names) == sorted(native.SETS.values())
