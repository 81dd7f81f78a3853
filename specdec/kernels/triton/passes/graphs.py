"""Capture the launches of a pass once, and replay them: CUDA graphs, over static inputs.

A pass of a 12B model is more than six hundred launches, and Python is expected to take longer to make them than a GPU
to run them. A pass that comes back is therefore captured: the same launches, at the same addresses, in one call. A pass
comes back when it has the same key (its number of rows, say) and reads the same stores; a store that grows, or goes,
takes its graphs with it. So each text has graphs of its own. What differs from pass to pass, the inputs, is copied to
where the captured launches read it. What is not captured, or not yet, runs the same launches one by one, to the same
bits.

The first pass of a key runs as it is. Before the capture the launches run once more, over the static inputs: kernels
are compiled and loaded then, also those that Triton makes for other alignments, which no capture allows. So what
launches do twice must be what they do once: a row may be written to its slot, and nothing added up. Left out: passes
with more than MOST_ROWS rows, prompts above all; whether their launches or the GPU take longer, nobody has measured.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 16  # of a pass that is captured
MOST_GRAPHS = 96  # that are kept: some ten numbers of rows and of drafted tokens, of a few texts

Tensors = tuple[Tensor, ...]
Launches = Callable[[Tensors], Tensors]
"""The launches of a pass, from its inputs to its outputs; it may ask the inputs for nothing but their shapes."""
Capture = Callable[[Callable[[], Tensors]], tuple[Callable[[], None], Tensors]]
"""A call that makes launches -> what replays them, and the outputs, where every replay leaves its results."""


@dataclass(eq=False)
class _Pass:
    """Keep what is known of a pass: `replay` once it was captured, with the inputs and the outputs of its launches."""

    reads: tuple[weakref.ref[object], ...]
    replay: Callable[[], None] | None = None
    inputs: Tensors = ()
    outputs: Tensors = ()


class Graphs:
    """Run passes: the first time launch by launch, captured from the second time on. `counts`: passes by what they are
    of and how they were run, as "pass replayed", "draft eager", "pass captured" (and then replayed)."""

    def __init__(self, capture: Capture | None, most: int = MOST_GRAPHS) -> None:
        """Capture with `capture` (None: nothing is captured), and keep `most` passes, those that ran last."""
        self.counts: Counter[str] = Counter()
        self.refused = ""  # why nothing is captured any more
        self._capture, self._most = capture, most
        self._passes: OrderedDict[object, _Pass] = OrderedDict()
        self._gone: list[object] = []  # keys of passes whose stores are gone
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return how many captured passes are kept."""
        return sum(one.replay is not None for one in self._passes.values())

    def run(
        self, what: str, key: object, reads: Sequence[object], inputs: Tensors, launches: Launches, captured: bool
    ) -> Tensors:
        """Return the outputs of `launches(inputs)`, in memory that no later pass writes to.

        `what`: the kind of pass, for the counts. `key`: all on which the launches depend besides the shapes of
        `inputs`. `reads`: the objects that hold the tensors at whose addresses they read and write, besides the
        weights. `captured`: whether such a pass may be captured at all. Inputs may lie on the CPU.
        """
        with self._lock:
            if not captured or self.refused or self._capture is None:
                return self._eager(what, inputs, launches)
            forms = tuple((one.shape, one.dtype) for one in inputs)
            found = self._known((what, key, tuple(map(id, reads)), forms, _stream(_device(inputs))), reads)
            if found is None:
                return self._eager(what, inputs, launches)
            if found.replay is None and not self._captured(what, found, inputs, launches):
                return self._eager(what, inputs, launches)
            assert found.replay is not None
            for static, given in zip(found.inputs, inputs, strict=True):
                static.copy_(given, non_blocking=True)
            found.replay()
            self.counts[f"{what} replayed"] += 1
            return tuple(out.clone() for out in found.outputs)

    def count(self, what: str) -> None:
        """Count a pass or a draft that is run elsewhere."""
        with self._lock:
            self.counts[what] += 1

    def forget_gone(self) -> None:
        """Drop the passes whose stores are gone, and their memory."""
        with self._lock:
            while self._gone:
                self._passes.pop(self._gone.pop(), None)

    def _known(self, key: object, reads: Sequence[object]) -> _Pass | None:
        """Return the pass of `key`, or note that it was there, and return None."""
        self.forget_gone()  # before the key is looked for: another object may have the place of one that is gone
        if (found := self._passes.get(key)) is not None:
            self._passes.move_to_end(key)
            return found
        forget = self._gone.append
        self._passes[key] = _Pass(tuple(weakref.ref(one, lambda _: forget(key)) for one in reads))
        if len(self._passes) > self._most:
            self._passes.popitem(last=False)
        return None

    def _captured(self, what: str, found: _Pass, inputs: Tensors, launches: Launches) -> bool:
        """Capture `launches`; return whether that went well."""
        assert self._capture is not None
        device = _device(inputs)
        with torch.inference_mode(False):  # or later passes could be replayed in that mode alone
            static = tuple(torch.empty_like(one, device=device).copy_(one) for one in inputs)
        try:
            with _current(device):
                launches(static)
                replay, outputs = self._capture(lambda: launches(static))
        except Exception as error:  # out of memory, a launch that cannot be captured, a kernel that does not compile
            self.refused = str(error).strip().partition("\n")[0]
            self._passes.clear()  # none of them is replayed any more, and their memory is wanted
            warnings.warn(f"passes are not captured any more: {self.refused}", stacklevel=2)
            return False
        found.inputs, found.outputs = static, outputs
        found.replay = replay  # the last: Ctrl-C may come between the lines
        self.counts[f"{what} captured"] += 1
        return True

    def _eager(self, what: str, inputs: Tensors, launches: Launches) -> Tensors:
        self.counts[f"{what} eager"] += 1
        device = _device(inputs)
        return launches(tuple(one.to(device, non_blocking=True) for one in inputs))


def _device(inputs: Tensors) -> torch.device:
    """Return the device of a pass: that of the inputs which do not come from the host."""
    return next((one.device for one in inputs if one.device.type != "cpu"), torch.device("cpu"))


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the one on which graphs are captured."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int:
    """Return a number for the stream on which the caller's launches run."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


class CUDACapture:
    """Capture as CUDA graphs of the current device. Those of one device and stream share the memory of what lies
    between inputs and outputs: they are replayed one after the other."""

    def __init__(self) -> None:
        # By device and stream: the stream that captures, the memory, and the graphs that are there.
        self._streams: dict[tuple[int, int], Any] = {}
        self._pools: dict[tuple[int, int], Any] = {}
        self._made: dict[tuple[int, int], weakref.WeakSet[Any]] = {}

    def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """Return what replays the launches of `run`, and the outputs."""
        device = torch.cuda.current_device()
        place = device, _stream(torch.device("cuda", device))
        if place not in self._streams:  # one of that device: the one that torch would take is the first device's
            make_stream: Any = torch.cuda.Stream  # which has no types
            self._streams[place], self._made[place] = make_stream(device), weakref.WeakSet()
        if not self._made[place]:  # torch refuses memory of which all graphs are gone, until it has given it back
            self._pools[place] = torch.cuda.graph_pool_handle()
        pool, stream = self._pools[place], self._streams[place]
        graph = torch.cuda.CUDAGraph()
        # After a capture that failed, torch would leave its stream the current one. Only this thread's calls count:
        # another one may copy a picture to the device meanwhile.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            outputs = run()
        self._made[place].add(graph)
        return graph.replay, outputs
