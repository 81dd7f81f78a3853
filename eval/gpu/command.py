"""`python -m eval.gpu`: build, check and time everything that runs on a GPU, in ten minutes.

What: each kernel is compared with the reference; then come the speed of memory, of products, of whole passes of a 12B
model with random weights, of its assistant's drafts, of prompts, of decoding with synthetic acceptance, the memory of
32k positions, transformers' own generation of the same shape, and texts with and without drafting. Every stage stands
alone: what fails, or what there is no time for, is told, and the others go on. One JSON file and one table come out.
Why a command of its own: a GPU is often rented for minutes, on a machine without any model. Left out: text of real
models, which `run.py bench --device cuda` measures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.cli import options as cli
from eval.cli.output import DIFFERS, INTERRUPTED, USER_ERROR, check_writable, put_record, run_guarded
from specdec.util.terminal import Terminal

if TYPE_CHECKING:  # torch and Triton are imported once the words of the command are known to be right
    import torch

    from eval.gpu.full_size import FullSize

ABOUT = """\
Build and check every kernel of a GPU, time all that a GPU is for, and compare it with what is wanted: a table, and with
--json a file. Takes less than ten minutes on a machine with a GPU, torch and Triton. Exit code 1 when a kernel differs
from the reference, or torch computes in its place, or a drafted text differs from the plain one, or none was compared;
bars that are missed are only shown. Without a GPU: exit code 2, or --interpret."""
SECONDS = 560.0
EXACT_PROMPTS, EXACT_TOKENS = 6, 120
Stage = Callable[[], dict[str, Any]]


class Stages:
    """Run stages one after the other, as long as there is time, and keep what each found."""

    def __init__(self, seconds: float, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to count `seconds`. `say`: where a stage is announced."""
        self.figures: dict[str, Any] = {}
        self.stages: list[dict[str, Any]] = []
        self.interrupted = False
        self._say, self._clock = say, clock
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
        if self.left < needs:
            record["error"] = f"left out: {needs:.0f} seconds needed, {max(0.0, self.left):.0f} are left"
            return False
        self._say(name)
        began = self._clock()
        try:
            self.figures |= stage()
        except KeyboardInterrupt:
            record["error"], self.interrupted = "interrupted", True
        except Exception as error:  # the others go on: one failure must not cost all figures of a rented machine
            lines = str(error).strip().splitlines() or [""]
            record["error"] = f"{type(error).__name__}: {lines[0][:300]}"
        record["seconds"] = self._clock() - began
        return record["error"] is None


def measure(interpret: bool, seconds: float, json_file: Path | None) -> int:
    """Run all stages, show the table and write the record; return the exit code."""
    check_writable(json_file)
    import torch

    from eval.cli.provenance import machine
    from eval.gpu.report import bars_table, differs, judge
    from specdec import kernels

    console = Terminal(stderr=True)
    device = torch.device("cpu" if interpret else "cuda")
    if interpret:
        kernels.choose("triton")
    stages = Stages(seconds, lambda name: console.print(f"{name} ...", markup=False))
    stages.run("checks", 5, lambda: check_figures(device, interpret))
    if not interpret:
        _on_the_device(stages)
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
    out = Terminal(highlight=False)
    for one in stages.stages:
        if one["error"]:
            out.print(f"{one['stage']}: {one['error']}", style="red", markup=False)
    for finding in record.get("checks", []):
        if not finding["ok"]:
            out.print(f"{finding['kernel']} {finding['what']} differs: {finding}", style="bold red", markup=False)
    if not interpret:
        out.print(bars_table(stages.figures))
    out.print(
        f"{record.get('checks_ok', 0)} of {len(record.get('checks', []))} checks hold; kernels: "
        f"{record['kernels_on_device']}",
        markup=False,
    )
    put_record(json_file, record)
    if stages.interrupted:
        return INTERRUPTED
    return DIFFERS if differs(record) else 0


def check_figures(device: torch.device, small: bool) -> dict[str, Any]:
    """Check every op on `device`; `small`: in small shapes."""
    from eval.gpu.checks import Checks

    found = list(Checks(device, small))
    return {"checks": [one.to_dict() for one in found], "checks_ok": sum(one.ok for one in found)}


def _on_the_device(stages: Stages) -> None:
    """Run the stages that need a GPU."""
    from eval.gpu.timing import bytes_taken, read_bandwidth

    figures = stages.figures
    models: list[FullSize] = []  # the one that was built; empty again where another model needs its memory

    def bandwidth() -> dict[str, Any]:
        return {"bytes_taken_at_first": bytes_taken(), "bandwidth": read_bandwidth()}

    def products() -> dict[str, Any]:
        from eval.gpu.full_size import product_figures

        return product_figures(figures["bandwidth"])

    def build() -> dict[str, Any]:
        from eval.gpu.full_size import FullSize

        models.append(FullSize())
        return {"weight_bytes": models[0].decoder.nbytes}

    def plain() -> dict[str, Any]:
        from eval.gpu.full_size import NAME
        from eval.gpu.transformers_speed import transformers_figures

        models.clear()
        return transformers_figures(NAME, figures["plain_tokens_per_second"], figures["prefill_tokens_per_second"])

    if stages.run("bandwidth", 5, bandwidth):
        stages.run("products", 20, products)
    if "bandwidth" in figures and stages.run("a 12B model of random weights", 90, build):
        stages.run("passes and drafts", 40, lambda: models[0].passes(figures["bandwidth"]))
        stages.run("prefill", 20, lambda: models[0].prefill())
        stages.run("decoding", 30, lambda: models[0].decoding())
        stages.run("memory", 15, lambda: models[0].memory(figures["bytes_taken_at_first"]))
    stages.run("exactness", 60, lambda: exactness_figures(stages.left))
    if "plain_tokens_per_second" in figures and "prefill_tokens_per_second" in figures:
        stages.run("transformers in bfloat16", 60, plain)


def exactness_figures(seconds: float) -> dict[str, Any]:
    """Compare drafted texts with plain ones on tiny models of Gemma 4's shape, in processes of their own."""
    identical = total = 0
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        _run(["eval.synthetic", "--config", "gemma-4-tiny", "--out", str(model)], seconds)
        for quantize in ("int4", "int8"):
            words = ["eval.exactness", "--model", str(model), "--device", "cuda", "--quantize", quantize]
            words += ["--prompts", str(EXACT_PROMPTS), "--tokens", str(EXACT_TOKENS), "--json", str(model) + ".json"]
            _run([*words, "--drafter", str(model / "assistant"), "suffix", "scripted"], seconds / 2, (0, DIFFERS))
            found = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
            identical, total = identical + found["identical"], total + found["total"]
    return {"identical": identical, "texts": total, "identical_share": identical / total}


def _run(words: Sequence[str], seconds: float, well: Sequence[int] = (0,)) -> None:
    """Run a module with `words`. Raises RuntimeError for an exit code that is not in `well`."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode not in well:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")


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
    cli.add_json_option(parser, "all figures")
    arguments = parser.parse_args(argv)
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

    def command() -> int:
        if why := why_not(arguments.interpret):
            print(why, file=sys.stderr)
            return USER_ERROR
        return measure(arguments.interpret, arguments.seconds, arguments.json)

    return run_guarded(command, arguments.json)


def why_not(interpret: bool) -> str:
    """Say why nothing can be measured here, in a sentence; "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, which compiles the kernels of a GPU: pip install triton"
    if interpret:
        return ""
    import torch

    if torch.cuda.is_available():
        interpreted = os.environ.get("TRITON_INTERPRET", "0").casefold() in ("1", "y", "on", "yes", "true")
        return "TRITON_INTERPRET is set, with which no kernel runs on the GPU: unset it" if interpreted else ""
    return "No GPU of NVIDIA's is here, which this measures; --interpret runs the checks on the CPU, in small"
