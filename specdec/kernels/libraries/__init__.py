"""Choose the library that computes on each device.

There are three: the native one for the CPU, Triton's kernels for CUDA devices, and the reference in torch for all that
neither serves. They have the same ops (those of `specdec/kernels/__init__.py`). SPECDEC_KERNELS=reference, native,
native: and an instruction set (portable, avx2, avxvnni, avx512, neon, i8mm), or triton, forces a path, for tests and
comparisons. The choice never depends on anything that could change with the number of rows. A library that is missing,
stale or broken leaves the reference, which `missing` explains; with SPECDEC_REQUIRE_NATIVE=1 a native one that is so is
an error, so that no test passes without it. Triton is imported where a CUDA device is first met, and its kernels are
checked on each one: two GPUs of a machine may be of different kinds.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import native, reference
from specdec.kernels.store import KVView

CHOICES = ("native", "reference", *(f"native:{word}" for word in native.SETS), "triton")

_CHOSEN = "chosen"
_compiled = native.load()  # the native library, or in words why there is none
if isinstance(_compiled, str) and native.is_required():
    raise RuntimeError(f"SPECDEC_REQUIRE_NATIVE is set, but {_compiled}; {native.how_to_build()}")
_choice = "native"
# The library that computes on a device, or in words why the reference does. Others than the CPU's are opened when met.
_libraries: dict[torch.device, Any] = {}
_CPU = torch.device("cpu")
_opening = threading.RLock()  # the check of the kernels calls them


def choose(choice: str) -> str:
    """Select one of CHOICES for the whole process, and return `active()`.

    "native" takes the best there is on every device, down to the reference; "triton" wants Triton's kernels: on a GPU,
    or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), for tests. Raises ValueError for another word, or for
    what this machine (or this build) lacks.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"unknown kernels {choice!r}: choose one of {', '.join(CHOICES)}")
    cpu = _open(_CPU, choice)
    with _opening:
        _libraries.clear()
        _choice, _libraries[_CPU] = choice, cpu
    return active()


def _open(device: torch.device, choice: str) -> Any:
    """Return the library that `choice` means for a device, or in words why there is none. Raises ValueError for a
    choice that cannot be had."""
    if choice == "reference":
        return _CHOSEN
    if device.type == "cuda":
        return _triton(device)
    if device.type != "cpu":
        return f"there are no kernels for {device.type}"
    if choice == "triton":
        interpreted = _triton(device)
        if not isinstance(interpreted, str):
            return interpreted
        why = _triton(_with_index(torch.device("cuda"))) if torch.cuda.is_available() else interpreted
        if isinstance(why, str):
            raise ValueError(f"triton cannot be used: {why}")
    return _native(choice.partition(":")[2], choice)


def _native(word: str, choice: str) -> Any:
    """Return the native library on the instruction set that `word` names, "" for the best; or why there is none."""
    if isinstance(_compiled, str):
        if word:
            raise ValueError(f"{choice} cannot be used: {_compiled}; {native.how_to_build()}")
        return _compiled
    name = native.SETS[word] if word else _compiled.available[-1]
    if name not in _compiled.available:
        raise ValueError(f"{choice} cannot be used: this CPU has {', '.join(_compiled.available)}")
    _compiled.use(name)
    return _compiled


def _triton(device: torch.device) -> Any:
    """Return Triton's kernels for a device, or in words why there are none."""
    try:
        from specdec.kernels.triton import open_library
    except Exception as error:  # another version may lack anything, a broken one may raise anything
        return f"Triton is missing, too old or broken ({error}): pip install 'specdec-mtp[gpu]'"
    return open_library(device)


def _with_index(device: torch.device) -> torch.device:
    """Return a device as tensors on it name it: a "cuda" without a number is the current one, and a CPU has none."""
    if device.type == "cpu":
        return _CPU
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _library_on(device: torch.device | str) -> Any:
    """Return the library for a device, or in words why there is none; it is opened at the first call."""
    device = _with_index(torch.device(device))
    library = _libraries.get(device)
    if library is None:
        with _opening:  # two models may meet a device at once: kernels are checked once, and passes are one object's
            library = _libraries.get(device)
            if library is None:
                library = _libraries[device] = _open(device, _choice)
    return library


def library_of(first: Tensor, *others: Tensor | None) -> Any:
    """Return the library of the device that the tensors are on; the reference where they are on several, or the device
    has no library."""
    device = first.device
    if any(part is not None and part.device != device for part in others):
        return reference
    library = _libraries.get(device)
    if library is None:
        library = _library_on(device)
    return reference if isinstance(library, str) else library


def differentiable_library(first: Tensor, *others: Tensor | None) -> Any:
    """Return `library_of` the tensors, but the reference where gradients of one are being recorded."""
    return reference if reference.recorded(first, *others) else library_of(first, *others)


def active(device: torch.device | str = "cpu") -> str:
    """Say in words which kernels run on a device: "native avx512-vnni, 2 threads", "triton 3.7.1 on NVIDIA H100", or
    "torch reference: " and the reason."""
    library = _library_on(device)
    if isinstance(library, str):
        return f"torch reference: {library}"
    if not isinstance(library, native.Native):
        return str(library.describe())
    if not library.has_threads:
        return f"native {library.instruction_set}, 1 thread (Windows: the kernels have no threads there yet)"
    threads = torch.get_num_threads()
    return f"native {library.instruction_set}, {threads} thread{'s' if threads > 1 else ''}"


def missing(device: torch.device | str = "cpu") -> str | None:
    """Say why torch computes on a device, all ops or some, although nobody chose it, and how to get the kernels.

    None where the kernels run, torch was chosen, or there are no kernels to get.
    """
    kind, library = torch.device(device).type, _library_on(device)
    if library == _CHOSEN or kind not in ("cpu", "cuda") or isinstance(library, native.Native):
        return None
    if not isinstance(library, str):
        return library.sentence() or None
    return f"{library}; {native.how_to_build()}" if kind == "cpu" else library


def arithmetic(device: torch.device | str = "cpu") -> str:
    """Name the arithmetic that gives results their rounding on a device: a cache that another arithmetic filled has
    other bits."""
    kind, library = torch.device(device).type, _library_on(device)
    if isinstance(library, str):
        return "reference" if kind == "cpu" else f"torch on {kind}"
    return f"native {library.instruction_set}" if isinstance(library, native.Native) else str(library.arithmetic)


def invariant(device: torch.device | str = "cpu") -> bool:
    """Return whether a row has the same bits on a device whatever the other rows of its pass are."""
    kind, library = torch.device(device).type, _library_on(device)
    if isinstance(library, str):
        return kind == "cpu"
    return isinstance(library, native.Native) or not library.refused


def interpreted(device: torch.device | str = "cpu") -> bool:
    """Return whether Triton's interpreter runs the kernels of a GPU on a device, the CPU: for checks, not for use."""
    library = _library_on(device)
    return torch.device(device).type == "cpu" and not isinstance(library, (str, native.Native))


def meet_stores(device: torch.device | str, views: Callable[[], Sequence[KVView | None]], rows: torch.dtype) -> None:
    """Let the library of a device check, where it has to, that its kernels hold for stores like `views()` and rows of
    the type `rows`. Whoever asks `missing`, `arithmetic` or `invariant` about a model before its first pass does this
    before."""
    if (keeps := getattr(_library_on(device), "keeps", None)) is not None:
        for view in views():
            if view is not None:
                keeps(view, rows)


def _graphs_of(library: Any) -> Any:
    """Return the captured passes of a library (`triton/passes/graphs.py`); None where it captures nothing."""
    return getattr(library, "graphs", None)


def count_uncaptured(device: torch.device, what: str) -> None:
    """Count a pass or a draft that is not made as a whole: "pass op-by-op", "draft step-by-step". `device`: with the
    index that tensors on it have."""
    if (graphs := _graphs_of(_libraries.get(device))) is not None:
        graphs.count(what)


def free_graphs(device: torch.device | str) -> None:
    """Give back the memory of captured passes whose stores are gone, which otherwise the next pass does."""
    if (graphs := _graphs_of(_library_on(device))) is not None:
        graphs.forget_gone()


def graph_counts(device: torch.device | str) -> Counter[str]:
    """Return how passes and drafts were run on a device until now, as "pass replayed"; empty where nothing is captured
    (`triton/passes/graphs.py`)."""
    graphs = _graphs_of(_library_on(device))
    return Counter() if graphs is None else Counter(graphs.counts)


try:
    choose(os.environ.get("SPECDEC_KERNELS", "native"))
except ValueError as error:
    warnings.warn(f"SPECDEC_KERNELS: {error}; using the best there is", RuntimeWarning, stacklevel=2)
    choose("native")
