"""`python -m eval.fuzz`: does every damaged file end in one sentence that names it?

What: tiny whole files of every kind that is read (models as folders and as GGUF, their settings and tokenizers, packed
files, conversations, drafters, training sets, prompts, pictures, sound, video) are damaged at random and read, each in
a process of its own; a model that loads also decodes a few tokens. Why: a user who opens a stranger's file, or one that
a disk has spoiled, is owed an answer at once, not a traceback, a hang or a full memory. Left out: files fetched from a
hub.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.cli import options as cli
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record, run_guarded

if TYPE_CHECKING:
    from eval.fuzz.runner import Case, Outcome, Runner

ABOUT = """\
Damage tiny files of every kind that is read, and read them: each case in a process of its own, with a limit of 5
seconds of processor time and of 1 GB of memory. A case passes when the file loads (and decodes) or is refused with a
ValueError on one line that names it; anything else fails. The same seed makes the same cases. Exit code 1 when a case
failed."""
NAMES = (
    "gguf", "manifest", "mmproj", "config", "generation", "tokenizer", "index", "safetensors", "quantised", "packed",
    "conversation", "head", "assistant", "drafter", "adapter", "gguf-adapter", "shards", "prompts", "use",
    "picture", "sound", "video",
)  # fmt: skip
KEEP = Path("runs/fuzz")
_SHOWN = 12  # failures that are printed
_TOGETHER = 12  # cases that one fork reads
_AHEAD = 2  # forks' work for each process that is waiting for it


@dataclass
class Tally:
    """Count the results of the cases of one kind, and the most that one case took: seconds of processor time, bytes."""

    results: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    grown: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count `outcome`."""
        self.results[outcome.result] += 1
        self.seconds, self.grown = max(self.seconds, outcome.seconds), max(self.grown, outcome.grown)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the most that a case took, in JSON types."""
        return {
            **{name: self.results[name] for name in ("loaded", "refused", "failed")},
            "most_seconds": self.seconds,
            "most_bytes": self.grown,
        }


def fuzz(
    cases: int, seed: int, kinds: Sequence[str] = NAMES, jobs: int = 1, keep: Path | None = None
) -> Iterator[Outcome]:
    """Yield the outcome of each of `cases` cases, as they end: the kinds in turn, in `jobs` processes.

    The files of failed cases are copied to `keep`.
    """
    from eval.fuzz.runner import Case

    every = [Case(kinds[i % len(kinds)], seed, i // len(kinds)) for i in range(cases)]
    waiting = iter([every[i : i + _TOGETHER] for i in range(0, cases, _TOGETHER)])
    with _seeds() as seeds, ProcessPoolExecutor(jobs, _processes(), _begin, (seeds,)) as pool:
        running = {pool.submit(_run, batch, keep) for batch in islice(waiting, _AHEAD * jobs)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(_run, batch, keep) for batch in islice(waiting, len(done))}
                for future in done:
                    yield from future.result()
        finally:
            for future in running:
                future.cancel()


def _processes() -> ForkServerContext:
    """Return what makes the processes: forks of one that has imported everything, once, and has computed nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["eval.fuzz.runner", "eval.fuzz.seeds"])
    return context


@contextmanager
def _seeds() -> Iterator[Path]:
    """Write a folder of whole files, in a process of its own: forks lose the threads of a process that has decoded."""
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as place:
        folder = Path(place) / "seeds"
        maker = _processes().Process(target=_write_seeds, args=(folder,))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise ValueError("the whole files that cases are made from could not be written; see above")
        yield folder


def _write_seeds(folder: Path) -> None:
    os.environ["SPECDEC_CACHE"] = str(folder.parent / "cache")
    from transformers.utils import logging

    from eval.fuzz.seeds import write_seeds

    logging.disable_progress_bar()
    folder.mkdir()
    write_seeds(folder)


_runner: Runner | None = None  # of a process of the pool


def _begin(seeds: Path) -> None:
    global _runner
    from eval.fuzz.runner import Runner

    _runner = Runner(seeds)


def _run(cases: list[Case], keep: Path | None) -> list[Outcome]:
    assert _runner is not None
    return _runner.run(cases, keep)


def _replay(folder: Path) -> int:
    from eval.fuzz.runner import Case, Runner
    from specdec.util.terminal import Terminal

    kind, *numbers = folder.resolve().name.split("-")
    if kind not in NAMES or not folder.is_dir():
        raise ValueError(
            f"{folder}: is no case; name a folder like {KEEP}/config-0-17, which a failed case was kept in"
        )
    with _seeds() as seeds:
        (outcome,) = Runner(seeds).read([Case(kind, *map(int, numbers))], [folder.resolve()])
    Terminal(highlight=False).print(f"{outcome.result}: {outcome.why}", markup=False)
    return DIFFERS if outcome.result == "failed" else 0


def _check(arguments: Any) -> int:
    from eval.live.parts import count_bar
    from specdec.util.terminal import Terminal

    kinds, keep = arguments.kind or NAMES, arguments.keep
    console = Terminal(highlight=False)
    tallies = {kind: Tally() for kind in kinds}
    failures: list[Outcome] = []
    interrupted = False
    with count_bar("reading damaged files", arguments.cases) as advance:
        try:
            for outcome in fuzz(arguments.cases, arguments.seed, kinds, arguments.jobs, keep):
                tallies[outcome.case.kind].add(outcome)
                advance()
                if outcome.result == "failed":
                    failures.append(outcome)
                    if len(failures) <= _SHOWN:
                        console.print(f"{outcome.case}: {outcome.why}", style="red", markup=False)
        except KeyboardInterrupt:
            interrupted = True
    _show(tallies, failures, keep, console)
    record = {
        "command": "fuzz",
        "seed": arguments.seed,
        "cases": sum(sum(tally.results.values()) for tally in tallies.values()),
        "failed": len(failures),
        "interrupted": interrupted,
        "kinds": {kind: tally.to_dict() for kind, tally in tallies.items()},
        "failures": [{"case": str(outcome.case), "why": outcome.why} for outcome in failures[:100]],
    }
    put_record(arguments.json, record)
    return DIFFERS if failures else INTERRUPTED if interrupted else 0


def _show(tallies: dict[str, Tally], failures: Sequence[Outcome], keep: Path, console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("kind")
    for name in ("loaded", "refused", "failed", "most s", "most MB"):
        table.add_column(name, justify="right")
    for kind, tally in tallies.items():
        counts = (f"{tally.results[name]:,}" for name in ("loaded", "refused", "failed"))
        table.add_row(kind, *counts, f"{tally.seconds:.1f}", f"{tally.grown / 1e6:.0f}")
    console.print(table)
    total = sum(sum(tally.results.values()) for tally in tallies.values())
    console.print(f"{total:,} damaged files read, {len(failures):,} failed")
    if failures:
        kept = keep / str(failures[0].case)
        console.print(f"again: python -m eval.fuzz --replay {kept}", soft_wrap=True, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.fuzz` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("fuzz", ABOUT)
    parser.add_argument("--cases", type=cli.whole_number(1), default=2000, metavar="N", help="how many (default 2000)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="S", help="which ones (default 0)")
    parser.add_argument(
        "--kind", nargs="+", choices=NAMES, metavar="K", help=f"only these kinds of files: {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--jobs", type=cli.threads, default=os.cpu_count() or 1, metavar="J", help="processes (default: one a core)"
    )
    parser.add_argument(
        "--keep", type=Path, default=KEEP, metavar="FOLDER", help=f"where failed cases are kept (default {KEEP})"
    )
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="read the case that was kept there again")
    cli.add_json_option(parser, "the figures")
    arguments = parser.parse_args(argv)

    def command() -> int:
        if not hasattr(os, "fork"):
            raise ValueError("damaged files are read in forks of a process, which this system does not have")
        check_writable(arguments.json)
        return _check(arguments) if arguments.replay is None else _replay(arguments.replay)

    return run_guarded(command, arguments.json)
