#!/usr/bin/env python
"""Composition root: arguments in, one call out. Without arguments: the bench on the default model.

Everything heavy is imported after the arguments were understood.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.cli.libraries import import_libraries
from eval.cli.names import full_size_names
from eval.cli.options import (
    DEFAULT_MODEL,
    DTYPES,
    KV_DTYPES,
    QUANTIZE,
    Parser,
    add_drafting_options,
    add_json_option,
    add_media_size_options,
    add_model_options,
    add_prometheus_option,
    add_sampling_options,
    check_names,
    fraction,
    settings_from,
    whole_number,
)
from eval.cli.output import check_head_folder, file_name, run_guarded
from eval.cli.terminal import say_loading
from eval.train.options import add_train_options

EXAMPLES = """\
examples:
  python run.py                              compare plain and drafted decoding, on the default model
  python run.py bench --limit 2 --json out.json
  python run.py bench --model gemma-3-270m --prompts mine.jsonl --temperature 0.8 --top-p 0.95
  python run.py bench --suite --modes adaptive fixed --repeat 3 --json runs/mine.json
  python run.py report runs/*.json            one HTML page of them
  python run.py bench --modes adaptive transformers llama.cpp --limit 2 --threads 2
  python run.py generate "Explain recursion." --stats
  cat notes.txt | python run.py generate - --max-new-tokens 400
  python run.py chat --draft-length 4        then type; /help lists its commands
  python run.py train --model gemma-3-270m --minutes 40 --out heads/gemma-3-270m

Drafting never changes the text: a drafted token is kept only when it is the one that the model itself chooses.
`python run.py COMMAND --help` explains a command's options.
exit codes: 0 all well, 1 outputs differed, 2 bad arguments or an unusable model, 130 stopped with Ctrl-C"""

BENCH_TEXT = """\
Decode every prompt plainly and with drafting, in alternating order, and compare speed and output. Shows tokens/s,
speed-up, mean acceptance length (tokens per round), acceptance by draft position, time to first token and peak
memory. Exit code 1 when an output differs."""

PROMPTS_TEXT = """\
a .jsonl file with {"prompt": ...}, {"turns": [...]} (Spec-Bench, MT-bench) or {"messages": [...]} per line, or a
.txt file with one prompt per line (default: eight prompts of this project)"""

MODES_TEXT = """\
Besides plain decoding: adaptive (default), k1 to k16 (always so many tokens; fixed: k1 to k6), suffix and mtp (one kind
of draft alone), wrong (drafts that are never right). And other engines, on the same .gguf file, prompts and threads, on
the CPU: transformers and transformers-lookup (in float32 and in bfloat16), llama.cpp and llama.cpp-ngram (all five
kinds of it). They need: pip install -c constraints.txt -e '.[bench]'. Eight prompts take minutes, transformers most of
them: try --limit 2 first. Leave the machine idle meanwhile: one busy core can make an engine that waits for all of its
threads ten times slower."""


REPORT_TEXT = """\
Draw what bench --json wrote, several runs side by side, as one HTML page: speed-up by task, acceptance by position,
latencies, where rounds spend their time, what passes cost, memory. The page needs no network and no other file."""
PLAN_TEXT = """\
Say what a model, its drafter and a context take in memory, and the longest context that fits, from headers alone. The
exit code is 1 when the context does not fit."""
TRAIN_TEXT = """\
Train a draft head for a model on this machine: the model answers prompts, many at a time, and a small network learns to
foresee its words. What is trained is used with --drafter FOLDER, by every command and by specdec.load. Prompts come
from the built-in generator, from text files, and from your own .jsonl files; the more they are like what you will ask,
the better. Ctrl-C, or a kill, loses at most two minutes: the same command goes on. Evaluations decode held-out prompts
for real, and the head that did best is the one that is kept. On several machines, or sockets:
torchrun --nproc-per-node N run.py train ..."""


def _program() -> str:
    """Return what a user typed: run.py, specdec or python -m specdec."""
    name = Path(sys.argv[0]).name
    return {"__main__.py": "python -m specdec", "specdec": "specdec", "specdec.exe": "specdec"}.get(name, "run.py")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, under the name that the user typed."""
    root = Parser(
        prog=_program(),
        description="Speculative decoding of local language models: the same text, sooner.",
        epilog=EXAMPLES if _program() == "run.py" else EXAMPLES.replace("python run.py", _program()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND")

    bench = commands.add_parser(
        "bench", help="compare plain and drafted decoding (the default)", description=BENCH_TEXT
    )
    bench.add_argument("--prompts", type=file_name, metavar="FILE", help=PROMPTS_TEXT)
    bench.add_argument(
        "--suite", action="store_true", help="128 prompts of eight tasks, Spec-Bench's six among them, instead of eight"
    )
    bench.add_argument(
        "--media", action="store_true", help="time the first token after pictures, sound and video, by kind and size"
    )
    bench.add_argument("--limit", type=whole_number(1), metavar="N", help="only the first N prompts")
    add_json_option(bench, "the JSON object")
    add_prometheus_option(bench)
    add_sampling_options(bench, max_new_tokens=128, seed=0)
    add_drafting_options(bench)
    add_model_options(bench)
    bench.add_argument(
        "--synthetic-acceptance",
        nargs="+",
        type=fraction,
        default=[],
        metavar="P",
        help="make the first, second, ... drafted token right with these probabilities, whatever the drafter says (it "
        "still takes its time): for checkpoints of random weights; labelled as synthetic",
    )
    modes = bench.add_argument_group("modes", MODES_TEXT)
    modes.add_argument("--modes", nargs="+", default=[], metavar="MODE", help="what to compare with plain decoding")
    modes.add_argument(
        "--repeat",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="repetitions; figures are medians of them (default 1)",
    )

    page = commands.add_parser("report", help="draw benches as an HTML page", description=REPORT_TEXT)
    page.add_argument("files", type=file_name, nargs="+", metavar="FILE", help="what run.py bench --json wrote")
    page.add_argument(
        "--out",
        type=file_name,
        metavar="FILE",
        help="the page (default: report.html here; -: stdout). Only a page that report wrote is replaced",
    )

    generate = commands.add_parser(
        "generate", help="answer one prompt", description="Answer one prompt on stdout, word by word as it comes."
    )
    generate.add_argument("prompt", help="the prompt, or - to read it from stdin")
    generate.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    generate.add_argument("--stats", action="store_true", help="say on stderr what drafting did")
    generate.add_argument("--no-speculation", action="store_true", help="decode plainly")
    add_json_option(generate, "text, token ids and figures")
    add_prometheus_option(generate)
    add_sampling_options(generate, max_new_tokens=256, seed=None)
    add_drafting_options(generate)
    add_model_options(generate)

    chat = commands.add_parser(
        "chat", help="converse", description="Converse in the terminal, or through a pipe. /help lists the commands."
    )
    chat.add_argument(
        "--dashboard",
        action="store_true",
        help="draw speed against plain, acceptance, where rounds spend their time, costs and memory while an answer "
        "comes; 'now' is the last 64 rounds. Plain lines after every answer where the output is not a terminal",
    )
    chat.add_argument(
        "--plain", action="store_true", help="show answers as the model wrote them: no Markdown, no wrapping"
    )
    chat.add_argument("--no-history", action="store_true", help="keep nothing of what is typed for the next session")
    add_prometheus_option(chat)
    add_sampling_options(chat, max_new_tokens=512, seed=None)
    add_drafting_options(chat)
    add_model_options(chat)

    train = commands.add_parser(
        "train",
        help="train a draft head for a model",
        description=TRAIN_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_train_options(train)
    add_json_option(train, "scores, settings and versions")
    add_model_options(train)
    planned = commands.add_parser(
        "plan", help="say what a model takes in memory, before it is loaded", description=PLAN_TEXT
    )
    add_plan_options(planned)
    add_json_option(planned, "the figures")
    return root


def add_plan_options(planned: argparse.ArgumentParser) -> None:
    """Add the options of `run.py plan` but `--json`."""
    planned.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="as for every command, or gemma-4-12b: the shape alone, of which no weights need to be here",
    )
    planned.add_argument(
        "--drafter", default="auto", metavar="NAME", help="auto (default), suffix, none, or a checkpoint"
    )
    planned.add_argument("--context", type=whole_number(1), default=4096, metavar="N", help="positions (default 4096)")
    planned.add_argument("--budget", metavar="SIZE", help="such as 16GB (default: what is free now)")
    planned.add_argument("--kv-dtype", choices=KV_DTYPES, default="float32", help="what the cache keeps")
    planned.add_argument("--quantize", choices=QUANTIZE, help="as for every command")
    planned.add_argument("--dtype", choices=DTYPES, default="float32", help="of activations")
    add_media_size_options(planned)


def run(arguments: argparse.Namespace) -> int:
    """Run the command that `arguments` name, and return its exit code. Raises ValueError: see the commands."""
    settings = settings_from(arguments)
    if arguments.command != "report":
        check_names(settings, getattr(arguments, "modes", ()), full_size_names() if arguments.command == "plan" else ())
    if arguments.command == "train":
        check_head_folder(arguments.out)
    if arguments.command in ("bench", "generate", "chat", "train"):
        say_loading(settings.model)
    if arguments.command in ("bench", "generate", "train"):  # chat does it where keys that are pressed meanwhile wait
        import_libraries()
    if arguments.command == "bench":
        from eval.bench.command import BenchOptions, bench

        a, modes, rates = arguments, tuple(arguments.modes), tuple(arguments.synthetic_acceptance)
        if a.media:
            from eval.bench.media import bench_media

            if a.prompts or a.suite or modes or rates:
                raise ValueError("--media has prompts of its own, decoded plainly; leave out what else to compare")
            return bench_media(settings, a.limit, a.repeat, a.json)
        return bench(settings, BenchOptions(a.prompts, a.suite, a.limit, modes, a.repeat, rates, a.json))
    if arguments.command == "report":
        from eval.report.command import report

        return report(arguments.files, arguments.out)
    if arguments.command == "generate":
        from eval.chat.answer import answer

        plain = arguments.no_speculation
        return answer(settings, arguments.prompt, not plain, arguments.stats, arguments.raw, arguments.json)
    if arguments.command == "train":
        from eval.train.command import options_from, train

        return train(settings, options_from(arguments), arguments.json)
    if arguments.command == "plan":
        return run_plan(arguments)
    from eval.chat.command import chat

    return chat(settings, arguments.dashboard, not arguments.plain, not arguments.no_history)


def run_plan(a: argparse.Namespace) -> int:
    """Run `run.py plan`. Raises ValueError: the budget is no amount of memory, or see `eval.plan.plan`."""
    import torch

    from eval.plan import Asked, plan
    from specdec.memory.plan import parse_bytes

    dtype, budget = getattr(torch, a.dtype), None if a.budget is None else parse_bytes(a.budget)
    asked = Asked(a.model, a.drafter, a.quantize, dtype, a.context, budget, a.kv_dtype, a.picture, a.frames)
    return plan(asked, a.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `run.py` with the words `argv` (None: the process's own); return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    # No command means bench, so that `run.py` and `run.py --limit 1` do the main job; --help stays the overview.
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["bench", *words]
    arguments = parser().parse_args(words)
    outputs = (getattr(arguments, name, None) for name in ("json", "prometheus", "out"))
    return run_guarded(lambda: run(arguments), *outputs)


if __name__ == "__main__":
    sys.exit(main())
