"""`python -m eval.gpu`: build, check and time everything that runs on a GPU, in ten minutes.

What: each kernel is compared with the reference; then come the speed of memory, of products, of whole passes of a 12B
model with random weights, of its assistant's drafts, of prompts, of decoding with synthetic acceptance, the memory of
32k positions, texts with and without drafting, and transformers' own generation of the same shape. Every stage stands
alone: what fails, or what there is no time for, is told, and the others go on. One JSON file and one table come out.
Why a command of its own: a GPU is often rented for minutes, on a machine without any model. Left out: the speed of real
models, which `run.py bench --device cuda` measures.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from eval.cli import options as cli
from eval.cli.output import DIFFERS, INTERRUPTED, USER_ERROR, check_writable, put_record, run_guarded
from specdec.util.terminal import Terminal
from specdec.util.text import describe_error

if TYPE_CHECKING:  # torch and Triton are imported once the words of the command are known to be right
    import torch

    from eval.gpu.full_size import FullSize

ABOUT = """\
Build and check every kernel of a GPU, time all that a GPU is for, and compare it with what is wanted: a table, and
with --json a file. Takes ten minutes at the most, as estimated, on a machine with a GPU, torch and Triton. Exit code 1
when a kernel differs from the reference or was not checked, or torch computes in its place, or a drafted text differs
from the plain one or was not compared; bars that are missed are only shown. Without a GPU: exit code 2, or
--interpret."""
SECONDS, CHECKING = 560.0, 0.5  # in all, and the share of it for the checks, which compile nearly all kernels
Stage = Callable[[], dict[str, Any]]


class Stages:
    """Run stages one after the other, as long as there is time, and keep what each found."""

    def __init__(
        self,
        seconds: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        clean: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to count `seconds`. `say`: where a stage is announced; `clean()`: what is done before each."""
        self.figures: dict[str, Any] = {}
        self.stages: list[dict[str, Any]] = []
        self.interrupted = False
        self._say, self._clock, self._clean = say, clock, clean
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - self._clock()

    def run(self, name: str, needs: float, stage: Stage) -> bool:
        """Run `stage`, which takes about `needs` seconds, and keep its figures; return whether it came to its end."""
        if self.interrupted:
            return False
        record: dict[str, Any] = {"stage": name, "seconds": 0.0, "error": None}
        self.stages.append(record)
        if (left := self.left) < needs:
            record["error"] = f"left out: {needs:g} seconds needed, {max(0.0, round(left, 1)):g} are left"
            return False
        self._say(name)
        began = self._clock()
        try:
            self._clean()
            self.figures |= stage()
        except KeyboardInterrupt:
            record["error"], self.interrupted = "interrupted", True
        except Exception as error:  # the others go on: one failure must not cost all figures of a rented machine
            record["error"] = describe_error(error)
        record["seconds"] = self._clock() - began
        return record["error"] is None


def measure(interpret: bool, seconds: float, models: Sequence[str], json_file: Path | None) -> int:
    """Run all stages, show the table and write the record; return the exit code. `models`: those of which texts are
    compared, besides a tiny one."""
    check_writable(json_file)
    import torch

    from eval.cli.provenance import machine
    from eval.gpu.report import differs, finite, judge
    from eval.gpu.timing import bytes_in_use
    from specdec import kernels

    console = Terminal(stderr=True)
    device = torch.device("cpu" if interpret else "cuda")
    if interpret:
        kernels.choose("triton")
    in_use = None if interpret else bytes_in_use()  # before a kernel or a check takes some

    def clean() -> None:
        gc.collect()
        kernels.free_graphs(device)
        if not interpret:
            torch.cuda.empty_cache()  # what torch keeps of tensors that are gone is no other stage's

    stages = Stages(seconds, lambda name: console.print(f"{name} ..."), clean=clean)
    stages.run("checks", 5, lambda: _check(stages, device, interpret, seconds * (1 - CHECKING)))
    if not interpret:
        _on_the_device(stages, device, in_use, models)
    out = Terminal(highlight=False)
    if stages.interrupted and not stages.figures.get("checks"):
        out.print(
            "interrupted before anything was found" + ("" if json_file is None else f"; {json_file} is not written")
        )
        return INTERRUPTED
    record = {
        "command": "gpu",
        "interpreted": interpret,
        **machine(device),
        "kernels_on_device": kernels.active(device),
        "kernels_missing": kernels.missing(device),
        "seconds": seconds - stages.left,
        "stages": stages.stages,
        **stages.figures,
        "bars": judge(stages.figures),
    }
    _show(out, record)
    put_record(json_file, finite(record))
    if stages.interrupted:
        return INTERRUPTED
    return DIFFERS if differs(record) else 0


def _show(out: Terminal, record: dict[str, Any]) -> None:
    """Print what went wrong, the tables of bars and checks, and how many checks hold."""
    from eval.gpu.report import bars_table, checks_table

    for one in record["stages"]:
        if one["error"]:
            out.print(f"{one['stage']}: {one['error']}", style="red")
    for what, compared in record.get("texts", {}).items():
        for one in compared["differing"]:
            where = f"{what}, {one['sampling']}, {one['drafter']}: {one['identical']} of {one['total']} identical"
            out.print(f"{where}; the first to differ: {one['first']}", style="bold red")
    for finding in record.get("checks", []):
        if not finding["ok"]:
            out.print(f"{finding['kernel']} {finding['what']} differs: {finding}", style="bold red")
    if not record["interpreted"]:
        out.print(bars_table(record))
    checks = record.get("checks", [])
    if checks:
        out.print(checks_table(checks))
    found = f"{sum(one['ok'] for one in checks)} of {len(checks)} checks hold" if checks else "no check was made"
    out.print(
        f"{found}{'' if 'checks_ok' in record else ', others are missing'}; kernels: {record['kernels_on_device']}"
    )


def _check(stages: Stages, device: torch.device, small: bool, others: float) -> dict[str, Any]:
    """Check every op on `device`; `small`: in small shapes. Each finding is among the figures at once. Raises
    TimeoutError after a check that leaves less than the `others` seconds that the other stages need."""
    from eval.gpu.checks import Checks

    found: list[dict[str, Any]] = []
    stages.figures["checks"] = found
    console = Terminal(stderr=True)
    with console.status("") as shown:
        for one in Checks(device, small):
            found.append(one.to_dict())
            shown.update(Text(f"{len(found)}: {one.kernel}, {one.what}"))
            if not small and stages.left < others:
                raise TimeoutError("the others are left out, for the other stages; run it again, with all compiled")
    return {"checks_ok": sum(one["ok"] for one in found)}


def _on_the_device(stages: Stages, device: torch.device, in_use: int | None, named: Sequence[str]) -> None:
    """Run the stages that need a GPU. `in_use`: bytes of its memory before the process took any; `named`: models of
    which texts are compared too."""
    from eval.gpu.timing import read_bandwidth

    figures = stages.figures
    models: list[FullSize] = []  # the one that was built; empty again where another model needs its memory

    def products() -> dict[str, Any]:
        from eval.gpu.full_size import product_figures

        return product_figures(figures["bandwidth"], device)

    def build() -> dict[str, Any]:
        from eval.gpu.full_size import FullSize

        models.append(FullSize(device))
        return {"weight_bytes": models[0].decoder.nbytes}

    def plain() -> dict[str, Any]:
        from eval.gpu.full_size import NAME
        from eval.gpu.transformers_speed import transformers_figures

        return transformers_figures(NAME, figures["plain_tokens_per_second"], figures["prefill_tokens_per_second"])

    if stages.run("bandwidth", 5, lambda: {"bandwidth": read_bandwidth()}):
        stages.run("products", 20, products)
    if "bandwidth" in figures and stages.run("a 12B model of random weights", 90, build):
        stages.run("passes and drafts", 40, lambda: models[0].passes(figures["bandwidth"]))
        stages.run("prefill", 20, lambda: models[0].prefill())
        stages.run("decoding", 30, lambda: models[0].decoding())
        stages.run("memory", 15, lambda: models[0].memory(in_use))
    models.clear()  # other processes need its memory
    _compare_texts(stages, device, named)
    if "plain_tokens_per_second" in figures and "prefill_tokens_per_second" in figures:
        stages.run("transformers in bfloat16", 60, plain)


def _compare_texts(stages: Stages, device: torch.device, named: Sequence[str]) -> None:
    """Compare drafted texts of a tiny model and of those `named` with plain ones, a stage for each."""
    from eval.gpu.texts import comparisons, make_tiny, share, text_figures

    found: dict[str, Any] = {}
    stages.figures["texts"] = found
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def compare(what: str, words: Sequence[str]) -> dict[str, Any]:
            found[what] = text_figures(words, device.type, stages.left, folder / "texts.json")
            return {"identical_share": share([*found.values()])}

        def make() -> dict[str, Any]:
            make_tiny(folder, stages.left)
            return {}

        stages.run("a tiny Gemma 4", 10, make)
        wanted = list(comparisons(folder / "tiny", named))
        stages.figures["texts_wanted"] = [what for what, _ in wanted]
        for what, words in wanted:
            stages.run(f"texts of {what}", 30, partial(compare, what, words))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.gpu` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("gpu", ABOUT)
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="run the checks alone, in small, under Triton's interpreter on the CPU: needs no GPU, takes a minute",
    )
    parser.add_argument(
        "--seconds", type=cli.positive, default=SECONDS, metavar="S", help=f"to be done in (default {SECONDS:.0f})"
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="compare drafted texts of this model, too, with its plain ones, 600 tokens long: smollm2-135m-instruct, "
        "gemma-3-270m (both are fetched), a file or a folder. Several times for several models",
    )
    cli.add_json_option(parser, "all figures")
    arguments = parser.parse_args(argv)
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

    if arguments.interpret and arguments.model:
        parser.error("--model needs a GPU: --interpret runs the checks of the kernels alone")

    def command() -> int:
        if why := why_not(arguments.interpret):
            print(why, file=sys.stderr)
            return USER_ERROR
        return measure(arguments.interpret, arguments.seconds, arguments.model or (), arguments.json)

    return run_guarded(command, arguments.json)


def _why_not_compiled() -> str:
    """Say why Triton could not build what talks to the driver, which it does at the first kernel; "" where it can."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "No C compiler is here, with which Triton builds what talks to the driver: install gcc"
    scheme = sysconfig.get_default_scheme()  # Debian's own has no headers, and Triton takes the other one
    header = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)) / "Python.h"
    if not header.is_file():
        return f"{header} is missing, which Triton needs to talk to the driver: install python3-dev, or python3-devel"
    return ""


def why_not(interpret: bool) -> str:
    """Say why nothing can be measured here, in a sentence; "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, which compiles the kernels of a GPU: pip install triton"
    if interpret:
        return ""
    if why := _why_not_compiled():
        return why
    import torch

    if torch.cuda.is_available():
        interpreted = os.environ.get("TRITON_INTERPRET", "0").casefold() in ("1", "y", "on", "yes", "true")
        return "TRITON_INTERPRET is set, with which no kernel runs on the GPU: unset it" if interpreted else ""
    return "No GPU of NVIDIA's is here, which this measures; --interpret runs the checks on the CPU, in small"
