"""Make Triton's interpreter faster for tests.

It puts its functions in the place of the language's at every call of a part of a kernel, which takes a third of the
time. Once for each launch is enough.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter


class _Nothing:
    """Stand for what a part of a kernel puts in place, which is there already."""

    def restore(self) -> None:
        """Leave everything as it is."""


class OncePerLaunch:
    """Take the place of the interpreter's `_patch_lang`. The first call of a launch is the kernel's, the others are
    those of its parts."""

    def __init__(self, patch: Any) -> None:
        """Patch with `patch`, which takes a function and patches the modules of the language that it names."""
        self._patch, self._patched = patch, set[int]()
        self._names: dict[Any, set[int]] = {}

    def __call__(self, function: Any) -> Any:
        """Patch the modules that `function` names, where that is still to be done; return what undoes it."""
        wanted, first = self._named(function), not self._patched
        if not first and wanted <= self._patched:
            return _Nothing()
        scope = self._patch(function)
        self._patched |= wanted
        if first:
            restore = scope.restore

            def ended() -> None:
                self._patched.clear()
                restore()

            scope.restore = ended
        return scope

    def _named(self, function: Any) -> set[int]:
        """Return which modules of the language `function` names."""
        if function not in self._names:
            language = {id(interpreter.tl), id(interpreter.tl.core)}
            named = {id(module) for module in function.__globals__.values() if inspect.ismodule(module)}
            self._names[function] = named & language
        return self._names[function]


def patch_once() -> None:
    """Patch the language once for each launch from now on."""
    patch: Any = getattr(interpreter, "_patch_lang", None)  # private: another version of Triton may not have it
    if patch is not None and not isinstance(patch, OncePerLaunch):
        interpreter._patch_lang = OncePerLaunch(patch)
