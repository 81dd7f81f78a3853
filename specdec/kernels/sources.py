"""The state of the C++ sources, as one hash: the build bakes it into the library, and loading compares it.

The standard library is all this module needs, because `setup.py` runs it before anything is installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "csrc"
_SUFFIXES = (".cpp", ".h", ".inl")


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
