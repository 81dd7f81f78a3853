"""Builds the optional native kernels; everything else about the package is in pyproject.toml.

The library is plain C++17 with a C interface: it needs no headers of Python or torch, so one call of whatever
C++ compiler is found builds it, in about a minute. Without a compiler, or when it fails, the install goes on and the
torch path runs; with SPECDEC_REQUIRE_NATIVE=1 it fails. CXX names another compiler; SPECDEC_CXXFLAGS adds options,
which is how CI asks for warnings and sanitizers.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = "specdec/kernels/csrc/native.cpp"
# By its path: the package itself cannot be imported before torch is there.
SOURCES = runpy.run_path("specdec/kernels/sources.py")
INCLUDED = [os.path.relpath(path) for path in SOURCES["source_files"]()]


class BuildNative(build_ext):
    """Make one compiler call per extension, with a file name that does not depend on the Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dll" if sys.platform == "win32" else ".so")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        commands = SOURCES["compiler_commands"](sys.platform, os.environ)
        tried = [command for command in commands if shutil.which(command[0])]
        state = f'-DSPECDEC_SOURCES_HASH="{SOURCES["sources_hash"]()}"'  # compared when the library is loaded
        for command in tried:
            done = subprocess.run(
                [*command, state, *ext.sources, "-o", str(target)], capture_output=True, text=True, errors="replace"
            )
            if done.returncode == 0:
                return
            self.warn(f"{command[0]} failed:\n{done.stderr[-2000:]}")
        why = f"native kernels not built ({'see above' if tried else 'no C++ compiler'})"
        if os.environ.get("SPECDEC_REQUIRE_NATIVE", "") not in ("", "0"):
            raise SystemExit(f"{why}, and SPECDEC_REQUIRE_NATIVE is set")  # an Exception would be taken as optional
        self.warn(f"{why}; torch runs instead; to build them, {SOURCES['what_to_install'](sys.platform)}")


class AnyPython(bdist_wheel):
    """Tag the wheel as one for every Python 3 of a platform: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("specdec.kernels._native", [SOURCE], depends=INCLUDED, optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
