"""`python -m eval.files.lattice`: what becomes of weights that were trained for 4 bits, and how long that takes.

What: a checkpoint is written whose matrices lie on the lattice of such a training (Google's `-qat-q4_0-unquantized`):
bfloat16 numbers, each a whole number -8..7 times the step of its block of 32, with largest numbers as frequent as they
were counted in a published checkpoint. It is loaded with quantize="int4" and, for comparison, by the rule of Q4_0 and
by the search that weights without a lattice get. Figures: the share of weights that are the same bfloat16 number again,
the relative squared error, the bits of a weight, and seconds for each gigabyte of bfloat16. Left out: the model's text.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, quants
from rich import box
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from eval.cli import options as cli
from eval.cli.output import DIFFERS, check_writable, put_record, run_guarded
from eval.cli.provenance import machine
from eval.synthetic.packed.folders import bfloat16_on_lattice
from specdec.kernels import pack_blocks
from specdec.util.terminal import Terminal
from specdec.weights import BlockWeight, SafetensorsCheckpoint
from specdec.weights.fit import fit_int4

SHARE = 0.97  # of the weights, at the least, that must come back
ROWS, COLUMNS = 3840, 3840  # of each matrix, as in a 12B model


def measure(matrices: int) -> dict[str, dict[str, float]]:
    """Return the figures of every way to quantise `matrices` matrices by name."""
    # Drawn once: the numbers of a matrix have no part in the time of another.
    w = bfloat16_on_lattice(ROWS, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({f"{i}.weight": w.clone() for i in range(matrices)}, file)
        checkpoint = SafetensorsCheckpoint(file)
        checkpoint.weight("0.weight", torch.float32, "int4")  # threads are there, pages in memory
        began = time.perf_counter()
        made = [checkpoint.weight(f"{i}.weight", torch.float32, "int4") for i in range(matrices)]
        seconds = time.perf_counter() - began
    ours = made[0]
    part = w[:256]  # the two others are shares and errors alone
    rule = quants.quantize(part.float().numpy(), GGMLQuantizationType.Q4_0)
    by_rule = torch.from_numpy(quants.dequantize(rule, GGMLQuantizationType.Q4_0))
    searched = BlockWeight(pack_blocks(*fit_int4(part.float()), 4))
    per_gigabyte = seconds / (matrices * w.nbytes / 1e9)
    return {
        "recovered steps": _figures(w, ours.dequantize(), 8 * ours.nbytes / w.numel()) | {"seconds": per_gigabyte},
        "the rule of Q4_0": _figures(part, by_rule, 4.5),
        "the search for other weights": _figures(part, searched.dequantize(), 8 * searched.nbytes / part.numel()),
    }


def _figures(w: Tensor, back: Tensor, bits: float) -> dict[str, float]:
    error = float((back - w.float()).square().sum() / w.float().square().sum())
    return {"same": float((back.bfloat16() == w).float().mean()), "error": error, "bits": bits}


def main(argv: list[str] | None = None) -> int:
    """Run `python -m eval.files.lattice` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("files.lattice", __doc__)
    parser.add_argument(
        "--matrices", type=int, choices=range(1, 65), default=17, metavar="N", help="of 29 MB, 1 to 64 (default 17)"
    )
    parser.add_argument("--threads", type=cli.threads, metavar="N", help="CPU threads (default: torch's choice)")
    cli.add_json_option(parser, "the figures")
    arguments = parser.parse_args(argv)

    def command() -> int:
        check_writable(arguments.json)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        figures = measure(arguments.matrices)
        Terminal(highlight=False).print(_table(figures))
        record: dict[str, Any] = {"command": "lattice", "figures": figures, **machine(torch.device("cpu"))}
        put_record(arguments.json, record)
        return 0 if figures["recovered steps"]["same"] >= SHARE else DIFFERS

    return run_guarded(command, arguments.json)


def _table(figures: dict[str, dict[str, float]]) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in ("quantised by", "same bfloat16", "squared error", "bits a weight", "s/GB"):
        table.add_column(name, justify="left" if name == "quantised by" else "right")
    for name, found in figures.items():
        seconds = f"{found['seconds']:.1f}" if "seconds" in found else ""
        table.add_row(name, f"{found['same']:.1%}", f"{found['error']:.1e}", f"{found['bits']:.2f}", seconds)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
