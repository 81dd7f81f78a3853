"""Libraries that must not be called: each is told apart when it is opened, and a sentence names what rebuilds it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from specdec import kernels
from specdec.kernels import abi, native, sources
from specdec.memory import plan
from tests.support.native.needs_native import needs_library

ROOT = Path(__file__).parents[2]
_library = native.load()
HEADER = (sources.FOLDER / "abi.h").read_text(encoding="utf-8")
NAMES = [record.__name__ for record in abi.RECORDS]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A copy of the library and of its sources, which a test may damage."""
    assert isinstance(_library, native.Native)
    shutil.copytree(sources.FOLDER, tmp_path / "csrc")
    return Path(shutil.copy(_library.path, tmp_path / "_native.so"))


def why_not(library: Path) -> str:
    found = native.load(library.parent)
    assert isinstance(found, str), "it is used"
    return found


def patch(library: Path, old: bytes, new: bytes) -> None:
    content = library.read_bytes()
    assert content.count(old) >= 1 and len(old) == len(new)
    library.write_bytes(content.replace(old, new))


def members(name: str) -> list[str]:
    """The fields of struct `name` in abi.h, in their order."""
    (body,) = re.findall(rf"^struct {name} \{{$(.*?)^\}};$", HEADER, re.DOTALL | re.MULTILINE)
    lines = [line.split("//")[0].strip() for line in body.splitlines()]
    declared = [line.removesuffix(";") for line in lines if line.endswith(";") and "(" not in line]
    return [re.split(r"[\s*]+", part.strip())[-1] for line in declared for part in line.split(",")]


def test_the_header_has_these_records_and_no_others() -> None:
    assert sorted(re.findall(r"^struct (\w+) \{", HEADER, re.MULTILINE)) == sorted(NAMES)


@pytest.mark.parametrize("record", abi.RECORDS, ids=NAMES)
def test_a_record_has_the_names_and_the_order_of_the_header(record: type[ctypes.Structure]) -> None:
    assert [field[0] for field in record._fields_] == members(record.__name__)


def test_a_layer_has_one_set_of_names() -> None:
    ours = {field.name for field in fields(kernels.LayerWeights)} - {"spec"}
    of_its_spec = {"kind", "heads", "kv_heads", "head_dim"}
    assert {field[0] for field in abi.Layer._fields_} == ours | of_its_spec | {"store"}


@needs_library
def test_a_copy_is_used(built: Path) -> None:
    assert isinstance(native.load(built.parent), native.Native)


@needs_library
@pytest.mark.parametrize("name", ["abi.h", "isa/rows.inl", "new.h"])
def test_other_sources_make_a_library_stale(built: Path, name: str) -> None:
    with (built.parent / "csrc" / name).open("a") as file:
        file.write("// after git pull\n")
    assert "is stale: it was built from other C++ sources" in why_not(built)
    assert str(built.parent / "csrc") in why_not(built)


@needs_library
def test_a_library_of_other_sources_is_stale(built: Path) -> None:
    now = sources.sources_hash()
    patch(built, now.encode(), now[::-1].encode())
    assert "is stale" in why_not(built)


@needs_library
def test_without_sources_there_is_nothing_to_compare(built: Path) -> None:
    shutil.rmtree(built.parent / "csrc")
    patch(built, sources.sources_hash().encode(), b"0" * 32)
    assert isinstance(native.load(built.parent), native.Native)


@needs_library
@pytest.mark.parametrize("symbol", ["specdec_sources_hash", "specdec_record_size", "specdec_draft"])
def test_a_library_without_a_function_is_of_another_version(built: Path, symbol: str) -> None:
    patch(built, symbol.encode() + b"\0", symbol[:-1].encode() + b"_\0")
    assert why_not(built) == f"the native library is of another version of specdec: it has no {symbol}"


@needs_library
def test_a_record_of_another_size_is_of_another_version(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(ctypes.Structure):
        _fields_ = (*abi.Layer._fields_, ("added", ctypes.c_int64))

    size = ctypes.sizeof(abi.Layer)
    monkeypatch.setattr(abi, "RECORDS", (*abi.RECORDS, Layer))
    assert why_not(built).endswith(f"its record Layer has {size} bytes, not {size + 8}")


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other headers")
def test_a_library_of_another_machine(built: Path) -> None:
    content = bytearray(built.read_bytes())
    content[18:20] = (0xF3 if content[18] != 0xF3 else 0x3E).to_bytes(2, "little")  # e_machine: RISC-V, or x86-64
    built.write_bytes(content)
    assert "does not load: it was built for another platform, or it is damaged" in why_not(built)


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(300), b"MZ" + bytes(300)])
def test_a_file_that_is_no_library(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "_native.so").write_bytes(content)
    assert "does not load: it was built for another platform, or it is damaged" in why_not(tmp_path / "_native.so")


def package(folder: Path, library: bytes | None) -> None:
    """A checkout in `folder`, as far as loading the kernels goes, with that library in it."""
    shutil.copytree(ROOT / "specdec", folder / "specdec", ignore=shutil.ignore_patterns("_native.*", "__pycache__"))
    shutil.copy(ROOT / "setup.py", folder)
    if library is not None:
        (folder / "specdec" / "kernels" / "_native.so").write_bytes(library)


def asked(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `missing()` says in a process that imports the checkout in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPECDEC_")}
    return subprocess.run(
        [sys.executable, "-c", "from specdec import kernels; print(kernels.missing())"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**kept, **environment},
    )


@needs_library
def test_new_sources_under_an_old_library_name_the_command(tmp_path: Path) -> None:
    assert isinstance(_library, native.Native)
    package(tmp_path, _library.path.read_bytes())
    assert asked(tmp_path, SPECDEC_REQUIRE_NATIVE="1").stdout == "None\n", "a library that fits is no obstacle"
    header = tmp_path / "specdec" / "kernels" / "csrc" / "abi.h"
    header.write_text(header.read_text().replace("float eps, scale;", "float eps, scale, more;"))
    done = asked(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is stale" in done.stdout
    assert done.stdout.endswith(f"then run: pip install --no-deps -e {tmp_path}\n")


@pytest.mark.parametrize("library", [None, b"not a library"])
def test_a_process_that_requires_the_library_ends_without_it(tmp_path: Path, library: bytes | None) -> None:
    package(tmp_path, library)
    assert asked(tmp_path, SPECDEC_REQUIRE_NATIVE="0").returncode == 0
    done = asked(tmp_path, SPECDEC_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    told = done.stderr.splitlines()[-1]
    assert "SPECDEC_REQUIRE_NATIVE is set, but" in told
    assert told.endswith(f"then run: pip install --no-deps -e {tmp_path}")


def test_a_build_that_requires_the_library_fails_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    package(tmp_path, None)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    for required, succeeds in (("0", True), ("1", False)):
        done = subprocess.run(
            build,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "CXX": str(tmp_path / "no-compiler"), "SPECDEC_REQUIRE_NATIVE": required},
        )
        assert (done.returncode == 0) is succeeds, done.stderr
        assert "native kernels not built (no C++ compiler)" in done.stderr


def test_the_plan_counts_as_many_pairs_of_a_mixture_as_the_kernels_hold() -> None:
    mixture = (sources.FOLDER / "mixture.h").read_text(encoding="utf-8")
    assert re.findall(r"kPairs = (\d+);", mixture) == [str(plan.PAIRS)]
