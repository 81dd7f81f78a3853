"""`python -m eval.server`: what serving costs, and whether answers are what requests want.

What: the same prompts through `generate()` and over HTTP, in turns: tokens a second, and how long after the first token
its bytes arrive. An answer of hundreds of tokens with a right prediction, one without every tenth line, a wrong one and
none, in turns. The same questions with a JSON schema or tools, and without. Sampled answers by schemas and tools, each
checked against its schema. With `--parts replay`: ten turns of an agent against this server and llama.cpp's. The server
runs in this process, and the client whose time is taken in one of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

from rich.console import Console

from eval.cli import options as cli
from eval.cli.figure_table import Column, FigureTable
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record, run_guarded
from eval.serve.command import check_installed
from specdec.util.terminal import Terminal

PARTS = ("http", "prediction", "constraint", "answers")
REPLAY = "replay"  # asked for by name: it needs llama.cpp
T = TypeVar("T")


def measure(arguments: argparse.Namespace, console: Console, bar: Console) -> int:
    """Measure the parts that were asked for; return the exit code: 1 where a text differs or an answer is wrong."""
    check_installed()
    if "answers" in arguments.parts and find_spec("jsonschema") is None:
        raise ValueError(
            "answers are checked by jsonschema; install it with: pip install -c constraints.txt jsonschema"
        )
    import torch

    from eval.bench.engines import check_packages
    from eval.cli.provenance import provenance
    from eval.cli.session import open_session
    from eval.prompts.sets import suite_prompts
    from eval.server import replay, speed, tasks
    from eval.server.served import serving
    from specdec import model_path

    if REPLAY in arguments.parts:
        check_packages(["llama.cpp"])
    session = open_session(cli.settings_from(arguments))
    file = model_path(session.settings.model)
    if REPLAY in arguments.parts and file.suffix != ".gguf":
        raise ValueError(f"--parts replay compares servers of one .gguf file, and {session.settings.model} is none")
    if not session.converses:
        raise ValueError(f"{session.settings.model} has no chat template, and is asked to converse")
    record: dict[str, Any] = {}
    interrupted = False
    every = suite_prompts()
    prompts = [one.opening() for one in every[:: max(1, len(every) // arguments.prompts)][: arguments.prompts]]
    with serving(session) as served:
        try:
            if "http" in arguments.parts:
                record["http"] = speed.http_record(_counted(bar, "prompts", speed.over_http(served, prompts)))
            if "prediction" in arguments.parts:
                found = _counted(bar, "predictions", speed.predictions(served, arguments.predicted, arguments.repeat))
                record["prediction"] = speed.prediction_record(found)
            if "constraint" in arguments.parts:
                for kind, made in (("schema", tasks.schema_tasks), ("tool", tasks.tool_tasks)):
                    bound = _counted(bar, f"{kind}s", speed.constrained(served, made(arguments.prompts)))
                    record.setdefault("constraint", {})[kind] = speed.constrained_record(bound)
            if "answers" in arguments.parts:
                for kind, made in (("schema", tasks.schema_tasks), ("tool", tasks.tool_tasks)):
                    outcomes = _counted(bar, f"answers by {kind}", tasks.answers(served, made(arguments.answers)))
                    record.setdefault("answers", {})[kind] = tasks.answers_record(outcomes)
            if REPLAY in arguments.parts:
                turns = replay.replayed(served, file, torch.get_num_threads(), arguments.repeat)
                record["replay"] = replay.replay_record(_counted(bar, "turns", turns))
        except KeyboardInterrupt:
            interrupted = True
    for table in _tables(record):
        console.print(table)
    wrong = _wrong(record)
    for line in wrong:
        console.print(line)
    head = {"command": "server", "interrupted": interrupted, **provenance(session)}
    put_record(arguments.json, {**head, **record})
    return INTERRUPTED if interrupted else DIFFERS if wrong else 0


def _counted(bar: Console, what: str, coming: Iterable[T]) -> list[T]:
    """Return all of `coming`, and say meanwhile how many there are."""
    found: list[T] = []
    with bar.status(what) as status:
        for one in coming:
            found.append(one)
            status.update(f"{len(found)} {what}")
    return found


def _tables(record: dict[str, Any]) -> Iterator[FigureTable]:
    if found := record.get("http"):
        table = FigureTable("", [Column("tokens/s", 3), Column("ratio", 2)], caption=_first_bytes(found))
        speeds = found["tokens_per_second"]
        table.add("generate() in process", (f"{speeds['in_process']:.1f}", ""))
        table.add("over HTTP", (f"{speeds['http']:.1f}", f"{found['ratio']:.3f}x"))
        yield table
    if rows := record.get("prediction"):
        columns = [Column("tokens/s", 3), Column("against none", 4), Column("accepted", 2), Column("rejected", 1)]
        for prompt in dict.fromkeys(row["prompt"] for row in rows):
            table = FigureTable(f"prediction, {prompt}", columns)
            for row in (row for row in rows if row["prompt"] == prompt):
                cells = (
                    f"{row['tokens_per_second']:.1f}",
                    f"{row['ratio']:.2f}x",
                    str(row["accepted"]),
                    str(row["rejected"]),
                )
                table.add(row["prediction"], cells)
            yield table
    if kinds := record.get("constraint"):
        table = FigureTable("tokens/s of answers", [Column("with", 2), Column("without", 1), Column("ratio", 3)])
        for kind, found in kinds.items():
            table.add(kind, (f"{found['with']:.1f}", f"{found['without']:.1f}", f"{found['ratio']:.2f}x"))
        yield table
    if kinds := record.get("answers"):
        table = FigureTable("answers", [Column("valid", 3), Column("cut by the length", 1), Column("of", 2)])
        for kind, found in kinds.items():
            table.add(f"by {kind}", (str(found["valid"]), str(found["cut"]), str(found["total"])))
        yield table
    if found := record.get("replay"):
        table = FigureTable(
            "ten turns of an agent",
            [Column("seconds", 4), Column("ratio", 3), Column("prompt tokens", 2), Column("computed", 1)],
        )
        for name in ("llama.cpp", "specdec"):
            one, ratio = found[name], f"{found['ratio']:.2f}x" if name == "specdec" else ""
            table.add(name, (f"{one['seconds']:.2f}", ratio, f"{one['prompt_tokens']:,}", f"{one['computed']:,}"))
        yield table


def _first_bytes(found: dict[str, Any]) -> str:
    first = found["first_byte_ms"]
    return (
        f"the first token's bytes came {first['median']:.1f} ms after it (median; at most {first['most']:.1f} ms); "
        f"{found['identical']} of {len(found['prompts'])} texts the same"
    )


def _wrong(record: dict[str, Any]) -> Sequence[str]:
    """Return a line for everything that is not as it must be."""
    lines = []
    if (found := record.get("http")) and found["identical"] < len(found["prompts"]):
        lines.append("texts over HTTP DIFFER from those of generate()")
    for row in record.get("prediction", ()):
        if not row["identical"]:
            lines.append(f"a text with a {row['prediction']} prediction DIFFERS from the one without")
    for found in record.get("answers", {}).values():
        lines += [f"INVALID: {one['task']}: {one['wrong']}" for one in found["wrong"]]
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run `python -m eval.server` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("server", __doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=(*PARTS, REPLAY), default=PARTS, help="what to measure (default: all but replay)"
    )
    parser.add_argument(
        "--prompts", type=cli.whole_number(1), default=24, metavar="N", help="of each comparison of speed (default 24)"
    )
    parser.add_argument(
        "--repeat",
        type=cli.whole_number(1),
        default=3,
        metavar="N",
        help="of predictions and of the agent (default 3)",
    )
    parser.add_argument(
        "--predicted", type=cli.whole_number(2), default=800, metavar="N", help="tokens of those answers (default 800)"
    )
    parser.add_argument(
        "--answers", type=cli.whole_number(1), default=200, metavar="N", help="by schemas, and by tools (default 200)"
    )
    cli.add_json_option(parser, "the figures")
    parser.add_argument(
        "--max-new-tokens", type=cli.whole_number(2), default=256, metavar="M", help="of each text (default 256)"
    )
    cli.add_drafting_options(parser)
    cli.add_model_options(parser)
    arguments = parser.parse_args(argv)

    def command() -> int:
        check_writable(arguments.json)
        return measure(arguments, Terminal(highlight=False), Terminal(stderr=True))

    return run_guarded(command, arguments.json)
