"""Cases of `python -m eval.fuzz`: damaged copies of whole files, read in processes of their own, and the outcomes.

What: `Runner.run` copies, damages and reads; `Outcome` is the result. Why forks: a crash, a hang and memory without end
then end nothing but their own case, and a fork of a process that has imported everything takes a hundredth of a second.
Processor time counts, not the clock, which a busy machine would move. Left out: systems without fork and resource
limits (Windows).
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn

import torch
from transformers.utils import logging

from eval.fuzz.cases import KINDS, UnsupportedError, World
from eval.fuzz.damage import damage
from specdec.media.source import MediaError
from specdec.memory.system import data_bytes, peak_bytes, resident_bytes
from specdec.util.heap import trim_heap
from specdec.weights.metadata import one_line

SECONDS = 5.0  # of processor time that reading a case may take
BYTES = 1 << 30  # that a case may take in memory
_CLOCK = 300.0  # seconds after which a case that does not compute either is stopped
_NAP = 1.0  # seconds of those that count at once: the clock goes on while a system holds all processes, or sleeps
_PRINTED = 1 << 14  # bytes of a case's output that are looked at
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MEMORY = re.compile(r"MemoryError|allocate memory|not enough memory|out of memory", re.IGNORECASE)


class Case(NamedTuple):
    """Name the `number`th case of a kind under a seed; a case always has the same damage."""

    kind: str
    seed: int
    number: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}-{self.number}"


@dataclass(frozen=True)
class Outcome:
    """Keep the result of a case: "loaded", "refused" with a ValueError that names the file, or "failed", and `why`.

    `seconds`: processor time. `grown`: bytes in memory at the most, above those of the process at its start.
    """

    case: Case
    result: str
    why: str
    seconds: float
    grown: int


class Runner:
    """Run cases in copies of this process, a few in each copy."""

    def __init__(self, seeds: Path) -> None:
        """Import and load in this process what its copies need. `seeds`: the folder of whole files."""
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        self.world = World(seeds)
        self.world.warm()
        gc.freeze()  # or a collection in the copy would write to, and so copy, every page that has an object on it

    def run(self, cases: Sequence[Case], keep: Path | None = None) -> list[Outcome]:
        """Make the cases, read them, and forget them; the failed cases are moved to `keep`."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            folders = [Path(place) / str(case) for case in cases]
            for case, folder in zip(cases, folders, strict=True):
                make_case(case, self.world.seeds, folder)
            outcomes: list[Outcome] = []
            while len(outcomes) < len(cases):  # a case that ends the process ends it for itself alone
                done = len(outcomes)
                outcomes += self.read(cases[done:], folders[done:])
            for outcome, folder in zip(outcomes, folders, strict=True):
                if outcome.result == "failed" and keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(keep / folder.name, ignore_errors=True)
                    shutil.copytree(folder, keep / folder.name)
            return outcomes

    def read(self, cases: Sequence[Case], folders: Sequence[Path]) -> list[Outcome]:
        """Read the files of cases in a copy of this process, up to the first case that ends the copy."""
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as printed:
            child = os.fork()
            if child == 0:
                _child(cases, folders, self.world, told.fileno(), printed.fileno())
            status = _wait(child, told.fileno())
            told.seek(0)
            said = [json.loads(line) for line in told if line.endswith(b"\n")]
            outcomes = [
                Outcome(case, *_judged(found, folder), found["seconds"], found["grown"])
                for case, folder, found in zip(cases, folders, said, strict=False)
            ]
            if len(outcomes) < len(cases):
                printed.seek(0)
                why = f"ended with {_ending(status)}; last printed: {printed.read()[-_PRINTED:]!r}"
                outcomes.append(Outcome(cases[len(outcomes)], "failed", why, 0.0, 0))
            return outcomes


def make_case(case: Case, seeds: Path, folder: Path) -> None:
    """Write the files of a case to the new `folder`."""
    kind, rng = KINDS[case.kind], Random(str(case))
    whole = seeds / rng.choice(kind.seeds)
    folder.mkdir(parents=True)
    for file in whole.iterdir():
        if file.is_file():
            os.link(file, folder / file.name) if _one_disk(file, folder) else shutil.copy(file, folder)
    damage(next(folder.glob(rng.choice(kind.files))), rng)
    if rng.random() < 0.7:
        kind.mend(folder)


def _one_disk(file: Path, folder: Path) -> bool:
    return file.stat().st_dev == folder.stat().st_dev


def _child(cases: Sequence[Case], folders: Sequence[Path], world: World, told: int, printed: int) -> NoReturn:
    """Read the cases and write each result as a line to the file `told`; this function never returns."""
    try:
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        warnings.simplefilter("always")
        for case, folder in zip(cases, folders, strict=True):
            line = json.dumps(_one(case, folder, world, printed)) + "\n"
            os.write(told, line.encode())
    finally:
        os._exit(0)


def _one(case: Case, folder: Path, world: World, printed: int) -> dict[str, Any]:
    os.environ["SPECDEC_CACHE"] = str(folder.parent / "cache")  # deleted with the case's folder
    start, before = _limit(), os.lseek(printed, 0, os.SEEK_END)
    began = time.process_time()
    said = {"kind": "", "message": "", "where": ""}
    try:
        KINDS[case.kind].read(folder, world)
    except UnsupportedError as error:
        said |= {"kind": "UnsupportedError", "message": str(error)}
    except BaseException as error:  # panics of libraries in Rust, too
        at = traceback.extract_tb(error.__traceback__)[-1]
        kind = "ValueError" if isinstance(error, MediaError) else type(error).__name__
        said |= {"kind": kind, "message": str(error), "where": f"{at.filename}:{at.lineno}"}
    seconds, grown = time.process_time() - began, max(0, peak_bytes() - start)
    sys.stdout.flush()
    sys.stderr.flush()
    text = os.pread(printed, _PRINTED, before).decode("utf-8", "replace")
    return {**said, "printed": text, "seconds": seconds, "grown": grown}


def _limit() -> int:
    """Allow the process BYTES and twice SECONDS more than now, and return the bytes that it has now."""
    trim_heap()  # or memory that the process freed before would serve again, and not be counted
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + int(2 * SECONDS) + 1, resource.RLIM_INFINITY))
    if (now := data_bytes()) is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (now + BYTES, resource.RLIM_INFINITY))
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the most that was resident is counted anew
    return resident_bytes()


def _wait(child: int, told: int) -> int:
    """Return the status with which `child` ends; stop a child that has written no result for long."""
    size, waited, last, pause = 0, 0.0, time.monotonic(), 0.001
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        if (now := os.fstat(told).st_size) > size:
            size, waited = now, 0.0
        last, before = time.monotonic(), last
        waited += min(last - before, _NAP)
        if waited > _CLOCK:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"SIGKILL": f"SIGKILL, after {_CLOCK:.0f} s", "SIGXCPU": f"SIGXCPU, after {2 * SECONDS:.0f} s"}.get(
            name, name
        )
    return f"status {os.WEXITSTATUS(status)}"


def _judged(said: dict[str, Any], folder: Path) -> tuple[str, str]:
    """Return the result of a case, and why."""
    kind, message, printed = said["kind"], said["message"], said["printed"]
    complaint = one_line(f"{kind}: {message[:1000]} ({said['where']})")
    if said["seconds"] > SECONDS:
        return "failed", f"took {said['seconds']:.1f} s of processor time; {complaint}"
    if said["grown"] > BYTES or _MEMORY.search(f"{kind} {message}"):
        return "failed", f"took {said['grown'] / 1e6:.0f} MB; {complaint}"
    if found := _CONTROL.search(printed + message):
        return "failed", f"shows the control character {found[0]!r}; {complaint}; it printed {printed[:500]!r}"
    if kind in ("", "UnsupportedError"):
        return "loaded", message
    if "\n" in message or not (kind in ("ValueError", "FetchError") and str(folder) in message):
        return "failed", complaint
    return "refused", message
