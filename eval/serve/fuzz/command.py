"""`python -m eval.serve.fuzz`: does the server answer every request, whatever is in it and whenever its client leaves?

What: good bodies of every endpoint are damaged at random (types, ranges, depth, encodings, schemas, fields of another
protocol) and sent to a server with a tiny model: each must be answered or refused, in time, and never by an error of
the server. Good requests over connections, three at a time, whose clients leave at any moment: nothing may be left of
them. Requests that schemathesis makes from `/openapi.json`. Memory is watched. The same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from eval.cli import options as cli
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record, run_guarded
from eval.serve.command import check_installed
from specdec.util.terminal import Terminal

PARTS = ("bodies", "leaving", "schema")
GROWTH = 32 << 20  # bytes that a part may come to hold besides, once it has done its first tenth
_SHOWN = 10  # failures that are printed


def fuzz(arguments: argparse.Namespace, console: Console) -> int:
    """Run the parts that were asked for; return the exit code: 1 where something failed."""
    check_installed()
    if "schema" in arguments.parts and find_spec("schemathesis") is None:
        raise ValueError("requests by schema need schemathesis: pip install -c constraints.txt schemathesis")
    from eval.live.parts import count_bar
    from eval.serve.fuzz.bodies import run_bodies
    from eval.serve.fuzz.leaving import run_leaving
    from eval.serve.fuzz.target import target

    faulthandler.enable()  # a crash of native code says at least where
    record: dict[str, Any] = {}
    interrupted = False
    with target() as on:
        try:
            if "bodies" in arguments.parts:
                with count_bar("sending damaged bodies", arguments.cases) as advance:
                    bodies = run_bodies(
                        on, arguments.cases, arguments.seed, arguments.sockets, advance, arguments.first
                    )
                    record["bodies"] = asyncio.run(bodies).to_dict()
            if "leaving" in arguments.parts:
                with count_bar("leaving", arguments.requests) as advance:
                    record["leaving"] = asyncio.run(
                        run_leaving(on, arguments.requests, arguments.seed, advance)
                    ).to_dict()
            if "schema" in arguments.parts:
                from eval.serve.fuzz.schema import run_schema

                record["schema"] = run_schema(on, arguments.examples, arguments.seed)
        except KeyboardInterrupt:
            interrupted = True
    failed = [*_failures(record)]
    _show(record, failed, console)
    head = {"command": "serve.fuzz", "seed": arguments.seed, "interrupted": interrupted}
    put_record(arguments.json, {**head, **record})
    return INTERRUPTED if interrupted else DIFFERS if failed else 0


def _failures(record: dict[str, Any]) -> list[str]:
    """Return a line for everything that failed."""
    lines = []
    for part, found in record.items():
        for one in found["failures"]:
            log = one.get("log", "").strip().splitlines()[-1:]
            lines.append(" ".join([f"{part} {one['case']} {one.get('path', '')}: {one['why']}", *log]))
        held = [int(n) for n in found.get("resident_bytes", {}).values()]
        if len(held) > 2 and held[-1] - held[1] > GROWTH:
            lines.append(f"{part}: grew from {held[1] / 1e6:.0f} MB to {held[-1] / 1e6:.0f} MB")
    return lines


def _show(record: dict[str, Any], failed: Sequence[str], console: Console) -> None:
    for part, found in record.items():
        told = {name: value for name, value in found.items() if name not in ("failures", "resident_bytes")}
        console.print(f"{part}: {json.dumps(told)}", soft_wrap=True, markup=False)
        if held := found.get("resident_bytes"):
            at = ", ".join(f"{bytes_ / 1e6:.1f} MB at {int(done):,}" for done, bytes_ in held.items())
            console.print(f"{part}: in memory {at}", soft_wrap=True, markup=False)
    for line in failed[:_SHOWN]:
        console.print(line, style="red", markup=False, soft_wrap=True)
    console.print(f"{len(failed):,} failed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.serve.fuzz` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("serve.fuzz", __doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=("bodies", "leaving"), help="default: the first two"
    )
    parser.add_argument(
        "--cases", type=cli.whole_number(1), default=5000, metavar="N", help="damaged bodies (default 5000)"
    )
    parser.add_argument(
        "--first", type=cli.whole_number(0), default=0, metavar="N", help="the number of the first of them (default 0)"
    )
    parser.add_argument(
        "--sockets", type=cli.fraction, default=0.05, metavar="P", help="the share that goes over connections (0.05)"
    )
    parser.add_argument(
        "--requests", type=cli.whole_number(1), default=1000, metavar="N", help="of clients that leave (default 1000)"
    )
    parser.add_argument(
        "--examples", type=cli.whole_number(1), default=200, metavar="N", help="of schemathesis, for each path (200)"
    )
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="S", help="which ones (default 0)")
    cli.add_json_option(parser, "the figures")
    arguments = parser.parse_args(argv)

    def command() -> int:
        check_writable(arguments.json)
        return fuzz(arguments, Terminal(highlight=False))

    return run_guarded(command, arguments.json)
