"""A source distribution holds everything that the repository does, so that it builds the kernels and runs the tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

import run

ROOT = Path(run.__file__).parent
MADE = {"PKG-INFO", "setup.cfg"}
LEFT_OUT = {".gitignore"}


def tracked() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is not a git checkout, whose files would say what there is")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_it_holds_every_file_of_the_repository(tmp_path: Path) -> None:
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        pytest.skip("setuptools, which builds it, is not installed")
    if int(version.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than the build asks for")
    files = tracked()
    for name in files:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    (tmp_path / "tree" / "specdec" / "kernels" / "_native.so").write_bytes(b"built here")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "tree", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        found = {name.partition("/")[2] for name in packed.getnames() if packed.getmember(name).isfile()}
    assert {*files} - LEFT_OUT - found == set()
    assert {name for name in found if ".egg-info/" not in name} - MADE == {*files} - LEFT_OUT
