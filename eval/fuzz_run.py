"""One case of `python -m eval.fuzz`: a damaged copy of a whole file, read in a process of its own, and what came of it.

What: `Runner.run` copies, damages and reads; `Outcome` is what happened. Why a fork for each case: a crash, a hang and
memory without end then belong to the case that made them, and a fork of a process that has imported everything takes a
hundredth of a second. Processor time counts, not the clock, which a busy machine would move. Left out: systems without
fork and resource limits (Windows).
"""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn

import torch
from transformers.utils import logging

from eval.fuzz_cases import KINDS, UnsupportedError, World
from eval.fuzz_files import damage
from specdec.plan import resident_bytes

SECONDS = 5.0  # of processor time that reading a case may take
BYTES = 1 << 30  # that a case may take in memory
_CLOCK = 60.0  # seconds after which a case that does not compute either is stopped
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MEMORY = re.compile(r"MemoryError|allocate memory|not enough memory|out of memory", re.IGNORECASE)


class Case(NamedTuple):
    """The `number`th case of a kind under a seed; always the same damage."""

    kind: str
    seed: int
    number: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}-{self.number}"


@dataclass(frozen=True)
class Outcome:
    """What came of a case: it was "loaded", "refused" with a ValueError that names the file, or "failed", and `why`.

    `seconds`: processor time. `grown`: bytes in memory at the most, above what the process had at its start.
    """

    case: Case
    result: str
    why: str
    seconds: float
    grown: int


class Runner:
    """Runs cases, one after another, in copies of this process."""

    def __init__(self, seeds: Path) -> None:
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        self.world = World(seeds)
        self.world.warm()

    def run(self, case: Case, keep: Path | None = None) -> Outcome:
        """Make the case, read it, and forget it; one that failed is moved to `keep`."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            folder = Path(place) / str(case)
            make_case(case, self.world.seeds, folder)
            outcome = self.read(case, folder)
            if outcome.result == "failed" and keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(keep / folder.name, ignore_errors=True)
                shutil.copytree(folder, keep / folder.name)
            return outcome

    def read(self, case: Case, folder: Path) -> Outcome:
        """Read the files of a case, which lie in `folder`, in a copy of this process."""
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as printed:
            child = os.fork()
            if child == 0:
                _child(case, folder, self.world, told.fileno(), printed.fileno())
            status, used = _wait(child)
            told.seek(0)
            printed.seek(0)
            said: dict[str, Any] = json.loads(told.read() or b"{}")
            text = printed.read().decode("utf-8", "replace")
        seconds = used.ru_utime + used.ru_stime
        grown = max(0, used.ru_maxrss * 1024 - int(said.get("start", used.ru_maxrss * 1024)))
        result, why = _judged(said, folder, text, status, seconds, grown)
        return Outcome(case, result, why, seconds, grown)


def make_case(case: Case, seeds: Path, folder: Path) -> None:
    """Write the files of a case to the new `folder`."""
    kind, rng = KINDS[case.kind], Random(str(case))
    whole = seeds / rng.choice(kind.seeds)
    folder.mkdir(parents=True)
    for file in whole.iterdir():
        if file.is_file():
            os.link(file, folder / file.name) if _one_disk(file, folder) else shutil.copy(file, folder)
    damage(folder / rng.choice(kind.files), rng)
    if rng.random() < 0.7:
        kind.mend(folder)


def _one_disk(file: Path, folder: Path) -> bool:
    return file.stat().st_dev == folder.stat().st_dev


def _child(case: Case, folder: Path, world: World, told: int, printed: int) -> NoReturn:
    """Read the case and say what came of it in the file `told`; never comes back."""
    said: dict[str, Any] = {"start": resident_bytes()}
    try:
        os.write(told, json.dumps(said).encode())
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ["SPECDEC_CACHE"] = str(folder.parent / "cache")  # what a case leaves there goes with it
        _limit()
        warnings.simplefilter("always")
        KINDS[case.kind].read(folder, world)
        said |= {"kind": "", "message": "", "where": ""}
    except UnsupportedError as error:
        said |= {"kind": "Unsupported", "message": str(error), "where": ""}
    except BaseException as error:  # panics of libraries in Rust, too
        where = traceback.extract_tb(error.__traceback__)[-1]
        said |= {"kind": type(error).__name__, "message": str(error), "where": f"{where.filename}:{where.lineno}"}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.ftruncate(told, 0)
        os.pwrite(told, json.dumps(said).encode(), 0)
        os._exit(0)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(2 * SECONDS), int(2 * SECONDS) + 1))
    status = Path("/proc/self/status")
    if found := status.is_file() and re.search(r"^VmData:\s+(\d+) kB$", status.read_text(), re.MULTILINE):
        most = int(found[1]) * 1024 + BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    end, pause = time.monotonic() + _CLOCK, 0.001
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return status, used
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            return status, used
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _judged(
    said: dict[str, Any], folder: Path, printed: str, status: int, seconds: float, grown: int
) -> tuple[str, str]:
    """The result of a case, and why."""
    kind, message = said.get("kind"), said.get("message", "")
    complaint = f"{kind}: {message} ({said.get('where')})"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return (
            "failed",
            f"killed by {signal.Signals(number).name} after {seconds:.1f} s; it had printed {printed!r:.500}",
        )
    if seconds > SECONDS:
        return "failed", f"took {seconds:.1f} s of processor time; {complaint}"
    if grown > BYTES or _MEMORY.search(f"{kind} {message}"):
        return "failed", f"took {grown / 1e6:.0f} MB; {complaint}"
    if kind is None:
        return "failed", f"ended with status {status} and said nothing; it had printed {printed!r:.500}"
    if found := _CONTROL.search(printed + message):
        return "failed", f"shows the control character {found[0]!r}; {complaint}; it printed {printed!r:.500}"
    if kind in ("", "Unsupported"):
        return "loaded", message
    if "\n" in message or not (kind in ("ValueError", "FetchError") and str(folder) in message):
        return "failed", complaint
    return "refused", message
