"""Import the names of a package at their first use (PEP 562), and large libraries without the collector's pauses."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def lazy(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of `package`: `homes` lists the public names of each of its modules."""

    def find(name: str) -> Any:
        for home, names in homes.items():
            if name in names:
                return getattr(import_uncollected(f"{package}.{home}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def import_uncollected(name: str) -> ModuleType:
    """Import the module `name` while Python's cycle collector is off, if it is on.

    Importing torch and transformers makes a million objects that stay. The collector would look through all of them
    again and again, for a tenth to a fifth of the time of the import.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if collecting:
            gc.enable()
