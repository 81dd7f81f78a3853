"""`python -m eval.kernels`: the cost of each kernel, and of a whole pass of a model, on this machine.

What: microseconds of the public functions of `specdec.kernels` at 1 to 512 rows, their share of the machine's read
bandwidth, and V(T)/V(1), on which the gain of drafting depends; then the same for a whole pass of a model, and its
prefill. `--full-size` instead builds a model of published shape with random weights, and decodes with it. The bandwidth
is measured again around every figure, for the machine may be shared; a share is of the better of the two readings. Left
out: GPUs, and text, acceptance and drafting, which `run.py bench` measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn

import specdec
from eval.cli import options as cli
from eval.cli.names import full_size_names
from eval.cli.output import INTERRUPTED, check_writable, put_record, run_guarded
from eval.cli.provenance import machine
from eval.cli.words import byte_size
from eval.kernels.bandwidth import Bandwidth
from eval.kernels.cases import DECODE, NAMES, QUICK_ROWS, cases
from eval.kernels.model_pass import adapter_costs, bytes_per_pass, decode_speed, pass_costs, prefill_speed
from eval.kernels.report import Series, bandwidth_dict, decoding_dict, heading, series_table
from eval.kernels.timing import Effort, KernelTiming, Neighbours, alternate
from eval.synthetic.full_size import full_size_model
from eval.synthetic.random_adapter import add_random_adapter
from specdec.model.decoder import Decoder
from specdec.util.terminal import Terminal

ABOUT = """\
Time the CPU kernels and whole passes of a model. T: rows of a pass (1 is plain decoding, k + 1 checks a draft of k).
V(T)/V(1): what checking costs beside plain decoding; the nearer to 1, the more drafting wins. GB/s: weights (or K and
V) read out of memory, beside what a plain read of memory reaches in the same minute. Other programs distort every
figure: compare shares and ratios, and read the last lines, which say how busy the machine was."""
MODEL = "model"
PREFILL = 512  # tokens
BUSY = 0.1  # processors that others use, from which on figures are not to be relied on
FULL_ROWS, FULL_PROMPT, FULL_TOKENS = (1, 2, 4, 8), 64, 32
ADAPTER_ROWS = (1, 4)
Report = Callable[[str], None]


@dataclass
class Measured:
    """Keep the figures that were measured so far: an interrupted run keeps them."""

    bandwidth: Bandwidth
    quick: bool = False
    repetitions: int | None = None
    series: list[Series] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)

    def effort(self, quick: Effort, thorough: Effort) -> Effort:
        """Return how often to repeat a call: the repetitions that were asked for, else `quick` or `thorough`."""
        if self.repetitions is not None:
            return Effort(self.repetitions, self.repetitions)
        return quick if self.quick else thorough

    def kernels(self, only: frozenset[str], report: Report) -> None:
        """Time the kernels named in `only`."""
        effort = self.effort(Effort(most=15, seconds=0.05), Effort())
        for case in cases(self.quick, only):
            report(f"{case.kernel} {case.what}")
            before = self.bandwidth.readings[-1]
            timings: dict[int, KernelTiming] = {}
            for some in ([t for t in case.rows if t in DECODE], [t for t in case.rows if t not in DECODE]):
                # Prefill has a rotation of its own: after 512 rows, one row finds neither its data nor its threads.
                timings |= alternate({rows: case.call(rows) for rows in some}, effort)
            ceiling = max(before, self.bandwidth.measure())
            self.series.append(Series.of(case.kernel, case.what, timings, case.bytes_read, ceiling))

    def passes(self, decoder: Decoder, context: int, rows: Sequence[int], report: Report) -> None:
        """Time whole passes, V(T). Raises ValueError: see `pass_costs`."""
        report(f"passes at {context} positions")
        before = self.bandwidth.measure()
        effort = self.effort(Effort(most=10, seconds=0.5), Effort(least=7, most=60, seconds=1.5))
        timings = pass_costs(decoder, context, rows, effort)
        ceiling = max(before, self.bandwidth.measure())
        what = f"pass after {context} positions"
        self.series.append(Series.of(MODEL, what, timings, bytes_per_pass(decoder), ceiling))

    def prefill(self, decoder: Decoder, tokens: int, report: Report) -> None:
        """Time a prompt of `tokens` tokens, or of as many as the model has room for, in tokens a second."""
        report(f"prefill of {tokens}")
        tokens = min(tokens, decoder.spec.max_positions)
        effort = self.effort(Effort(most=5, seconds=2.0), Effort(most=7, seconds=2.0))
        timing = prefill_speed(decoder, tokens, effort)
        self.model |= {"prefill_tokens": tokens, "prefill_tokens_per_second": tokens / timing.median}

    def full_size(self, name: str, context: int, kv_dtype: torch.dtype, report: Report, adapter_rank: int = 0) -> None:
        """Build the shape `name`, decode plainly, and time passes after `context` positions of `kv_dtype`; with
        `adapter_rank` also those with a random adapter.

        Raises ValueError: see `full_size_model`.
        """
        model = full_size_model(name, lambda tensor: report(f"random weights: {tensor}"), kv_dtype)
        bytes_read = bytes_per_pass(model.decoder)
        self.model = {"name": name, "weight_bytes": model.decoder.nbytes, "bytes_per_pass": bytes_read}
        self.model["kv_dtype"] = str(model.decoder.kv_dtype).removeprefix("torch.")
        report("decoding")
        before = self.bandwidth.measure()
        decoding = decode_speed(model, FULL_PROMPT, 8 if self.quick else FULL_TOKENS)
        ceiling = max(before, self.bandwidth.measure())
        self.model["decoding"] = decoding_dict(decoding, bytes_read, ceiling)
        self.passes(model.decoder, context, FULL_ROWS, report)
        if adapter_rank:
            self.adapter(model.decoder, context, adapter_rank, report)

    def adapter(self, decoder: Decoder, context: int, rank: int, report: Report) -> None:
        """Time passes with a random adapter of `rank` on all matrices, and without it, in turn."""
        report(f"passes with an adapter of {rank} ranks")
        adapter = add_random_adapter(decoder, rank)
        effort = self.effort(Effort(most=10, seconds=1.0), Effort(least=9, most=60, seconds=10.0))
        costs = adapter_costs(decoder, context, ADAPTER_ROWS, adapter.name, effort)
        found = [
            {
                "rows": rows,
                "us": plain.median * 1e6,
                "adapted_us": with_it.median * 1e6,
                "repetitions": len(plain.seconds),
            }
            for rows, (plain, with_it) in costs.items()
        ]
        self.model["adapter"] = {"rank": rank, "bytes": adapter.nbytes, "passes": found}


def measure(arguments: argparse.Namespace) -> int:
    """Measure, show and write; return the exit code. Raises ValueError: the model or a file is not usable."""
    check_writable(arguments.json)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    only = frozenset(arguments.only)
    console, interrupted = Terminal(stderr=True), False
    neighbours = Neighbours()
    measured = Measured(Bandwidth(torch.get_num_threads()), arguments.quick, arguments.repetitions)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=None)

        def report(what: str) -> None:
            progress.update(task, description=what)

        try:
            if arguments.full_size:
                kv_dtype = getattr(torch, arguments.kv_dtype)
                measured.full_size(arguments.full_size, arguments.context, kv_dtype, report, arguments.adapter_rank)
            else:
                measured.kernels(only, report)
                if MODEL in only:
                    model = specdec.load(arguments.model, drafter=None, quantize=arguments.quantize, device="cpu")
                    decoder = model.decoder
                    measured.model = {
                        "name": arguments.model,
                        "weight_bytes": decoder.nbytes,
                        "bytes_per_pass": bytes_per_pass(decoder),
                    }
                    measured.passes(decoder, arguments.context, QUICK_ROWS if arguments.quick else DECODE, report)
                    measured.prefill(decoder, PREFILL, report)
        except KeyboardInterrupt:
            interrupted = True
    record = {
        "command": "kernels",
        "interrupted": interrupted,
        **machine(torch.device("cpu")),
        "cores_used_by_others": neighbours.cores,
        "bandwidth": bandwidth_dict(measured.bandwidth.readings, measured.bandwidth.reader),
        "series": [series.to_dict() for series in measured.series],
        "model": measured.model,
    }
    _show(measured, record)
    put_record(arguments.json, record)
    return INTERRUPTED if interrupted else 0


def _show(measured: Measured, record: dict[str, Any]) -> None:
    console = Terminal(highlight=False)
    for series in measured.series:
        console.print(heading(series), style="bold", markup=False)
        console.print(series_table(series), "")
    if name := measured.model.get("name"):
        console.print(f"{name}: {byte_size(measured.model['weight_bytes'])} of weights", markup=False)
    if speed := measured.model.get("prefill_tokens_per_second"):
        console.print(f"prefill of {measured.model['prefill_tokens']} tokens: {speed:,.0f} tokens/s")
    if decoding := measured.model.get("decoding"):
        console.print(
            f"plain decoding of {decoding['tokens']} tokens after {decoding['prompt_tokens']}: "
            f"{decoding['tokens_per_second']:.2f} tokens/s, {byte_size(decoding['bytes_per_token'])} a token, "
            f"{decoding['share_of_bandwidth']:.0%} of {decoding['bandwidth_gb_per_second']:.1f} GB/s "
            f"(by the median token {decoding['median_tokens_per_second']:.2f} tokens/s, "
            f"{decoding['median_share_of_bandwidth']:.0%})"
        )
    if adapter := measured.model.get("adapter"):
        for one in adapter["passes"]:
            console.print(
                f"V({one['rows']}) with an adapter of {adapter['rank']} ranks on all matrices "
                f"({byte_size(adapter['bytes'])}): {one['adapted_us'] / 1e3:,.1f} ms, without it "
                f"{one['us'] / 1e3:,.1f} ms: {one['us'] / one['adapted_us']:.3f}x the speed"
            )
    bandwidth = record["bandwidth"]
    console.print(
        f"kernels: {record['host']['kernels']}. Reading memory ({bandwidth['reader']}): "
        f"{bandwidth['best_gb_per_second']:.1f} GB/s at best, {bandwidth['worst_gb_per_second']:.1f} at worst",
        markup=False,
    )
    if (others := record["cores_used_by_others"]) is not None and others > BUSY:
        console.print(
            f"Other programs kept {others:.1f} of {record['host']['logical_cpus']} processors busy meanwhile: threads "
            "had to wait for each other, and these figures are worse than the machine's.",
            style="yellow",
        )
    if record["interrupted"]:
        console.print("interrupted: these are the figures that were taken", style="yellow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.kernels` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("kernels", ABOUT)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, rows and repetitions: about half a minute")
    parser.add_argument(
        "--repetitions",
        type=cli.whole_number(1),
        metavar="N",
        help="time every call N times; a figure is the median (default: as often as some seconds allow, shown by "
        "--json)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*NAMES, MODEL],
        default=[*NAMES, MODEL],
        metavar="PART",
        help=f"of {', '.join([*NAMES, MODEL])} (default: all)",
    )
    parser.add_argument(
        "--context",
        type=cli.whole_number(1),
        default=256,
        metavar="N",
        help="positions before the passes (default 256)",
    )
    parser.add_argument(
        "--full-size",
        choices=full_size_names(),
        metavar="SHAPE",
        help=f"instead of all that: a model of this shape ({', '.join(full_size_names())}) with random 4-bit weights "
        "in memory, about 10 GB for gemma-4-12b; decodes 32 tokens and times passes",
    )
    parser.add_argument(
        "--adapter-rank",
        type=cli.whole_number(0, 1024),
        default=0,
        metavar="N",
        help="with --full-size: time passes with a random LoRA adapter of so many ranks on all matrices too, in turn "
        "with passes without it",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=cli.KV_DTYPES,
        default="float32",
        help="how --full-size keeps K and V (default: float32)",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=cli.DEFAULT_MODEL, metavar="NAME", help=f"default: {cli.DEFAULT_MODEL}")
    group.add_argument("--quantize", choices=cli.QUANTIZE, help="as for run.py (default: as stored)")
    group.add_argument("--threads", type=cli.threads, metavar="N", help="CPU threads (default: torch's choice)")
    cli.add_json_option(parser, "the figures")
    arguments = parser.parse_args(argv)
    return run_guarded(lambda: measure(arguments), arguments.json)
