"""How the library is built: the compiler's command for each system, and the state of the C++ sources.

The state is a hash that the build bakes into the library and that loading compares. On Linux and macOS g++ or clang++
builds; on Windows clang++ or the g++ of MinGW-w64, and not Microsoft's compiler, which has neither their attributes nor
their pragmas for instruction sets.

The standard library is all this module needs, because `setup.py` runs it before anything is installed.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "csrc"
_SUFFIXES = (".cpp", ".h", ".inl")
# Bits must not depend on the compiler's taste: no fused multiply-add, no reordering of float sums.
_FLAGS = "-std=c++17 -O3 -fvisibility=hidden -ffp-contract=off -fno-fast-math -fno-math-errno -fno-exceptions -fno-rtti"


def compiler_commands(platform: str, environment: Mapping[str, str]) -> list[list[str]]:
    """Return the commands that may build the library on `platform` (as in `sys.platform`), the best one first.

    CXX in `environment` names the only compiler; SPECDEC_CXXFLAGS gives it options. Sources and output are left out.
    """
    windows = platform == "win32"
    names = [environment["CXX"]] if environment.get("CXX") else ["c++", "g++", "clang++"]
    if windows and not environment.get("CXX"):
        names = ["clang++", "g++"]
    # A user's compiler is not asked for warnings: a newer one may have some that nobody has seen yet.
    more = shlex.split(environment.get("SPECDEC_CXXFLAGS", "-w"))
    commands = []
    for name in names:
        command = shlex.split(name.replace("\\", "/") if windows else name)
        command += [*_FLAGS.split(), *more, "-shared"]
        if windows:
            command.append("-static")  # the library finds its runtime wherever it is loaded
            if "clang" not in name:
                # g++ does not align the stack for AVX registers there (gcc's bug 54412): no spill may rely on that.
                command.append("-Wa,-muse-unaligned-vector-move")
        else:
            command.append("-fPIC")
        if platform.startswith("linux"):
            command.append("-pthread")
        commands.append(command)
    return commands


def what_to_install(platform: str) -> str:
    """Say in words which compiler builds the library on `platform`."""
    if platform == "win32":
        return "install clang++ or the g++ of MinGW-w64 where neither is there (Microsoft's compiler does not do)"
    return "install g++ or clang++ where neither is there"


def source_files(folder: Path = FOLDER) -> list[Path]:
    """List the C++ files in `folder` and below it, in the order of their names there."""
    found = [path for path in folder.rglob("*") if path.suffix in _SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def sources_hash(folder: Path = FOLDER) -> str:
    """Return 32 hexadecimal digits for the names and contents of the C++ files in `folder`; "" where none are there."""
    files = source_files(folder)
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:32] if files else ""
