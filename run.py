#!/usr/bin/env python
"""Composition root: arguments in, one call out. Without arguments: the bench on the default model.

Everything heavy is imported after the arguments were understood.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.cli.parser import HelpFormatter, Parser

if TYPE_CHECKING:
    from eval.cli.options import GenerationSettings

EXAMPLES = """\
examples:
  python run.py                         compare plain and drafted decoding
  python run.py bench --limit 2 --json out.json
  python run.py bench --model gemma-3-270m --prompts mine.jsonl --top-p 0.95
  python run.py bench --suite --modes adaptive fixed --json runs/mine.json
  python run.py report runs/*.json      one HTML page of them
  python run.py bench --modes adaptive transformers llama.cpp --limit 2
  python run.py generate "Explain recursion." --stats
  cat notes.txt | python run.py generate - --max-new-tokens 400
  python run.py generate "What is this?" --image cat.png --model mymodel.gguf
  python run.py chat --draft-length 4   then type; /help lists its commands
  python run.py chat --learn            keep what is said, for train --from-use
  python run.py serve --port 8080       for clients of http://127.0.0.1:8080/v1
  python run.py train --model gemma-3-270m --minutes 40 --out heads/mine
  python run.py pull unsloth/gemma-4-12b-it-GGUF:Q4_0     for --model afterwards
  python run.py models                  what is here, and what each would take

Drafting never changes the text: a drafted token is kept only when it is the one that the model itself chooses.
`python run.py COMMAND --help` explains a command's options.

exit codes: 0 all well, 1 outputs differed, 2 bad arguments or an unusable model, 130 stopped with Ctrl-C"""

COMMANDS = {
    "bench": "compare plain and drafted decoding (the default)",
    "report": "draw benches as an HTML page",
    "generate": "answer one prompt",
    "chat": "converse",
    "serve": "answer agents and editors, through OpenAI's and Anthropic's interfaces",
    "train": "train a draft head for a model",
    "learned": "show what chat and serve kept with --learn, or erase it",
    "plan": "say what a model takes in memory, before it is loaded",
    "models": "list the models on this disk, and what each would take",
    "show": "say what a model is, and what lies beside it",
    "pull": "fetch a model, with its drafter",
    "remove": "delete a model that was fetched",
    "export": "write a drafter of a Gemma 4 model as a file for llama.cpp",
}


def _program() -> str:
    """Return what a user typed: run.py, specdec or python -m specdec."""
    name = os.path.basename(sys.argv[0])
    return {"__main__.py": "python -m specdec", "specdec": "specdec", "specdec.exe": "specdec"}.get(name, "run.py")


def parser(*names: str) -> argparse.ArgumentParser:
    """Return the parser of all commands, under the name that the user typed. Those of `names` have their options; the
    others would need imports that take longer than `--help` may."""
    root = Parser(
        prog=_program(),
        description="Speculative decoding of local language models: the same text, sooner.",
        epilog=EXAMPLES if _program() == "run.py" else EXAMPLES.replace("python run.py", _program()),
        formatter_class=HelpFormatter,
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND")
    made = {name: commands.add_parser(name, help=summary) for name, summary in COMMANDS.items()}
    if names:
        from eval.commands import ADD_OPTIONS
        from eval.files.options import ADD_OPTIONS as OF_FILES

        for name in names:
            {**ADD_OPTIONS, **OF_FILES}[name](made[name])
    return root


def run(arguments: argparse.Namespace) -> int:
    """Run the command that `arguments` name, and return its exit code. Raises ValueError: see the commands."""
    from eval.cli.libraries import import_libraries
    from eval.cli.names import full_size_names
    from eval.cli.options import check_names, settings_from
    from eval.cli.output import check_head_folder
    from eval.cli.terminal import say_loading

    settings = settings_from(arguments)
    if arguments.command not in ("report", "learned", "models", "show", "pull", "remove"):
        check_names(settings, getattr(arguments, "modes", ()), full_size_names() if arguments.command == "plan" else ())
    if arguments.command == "train":
        check_head_folder(arguments.out)
    if arguments.command == "generate":
        from eval.chat.files import check_media

        check_media(arguments)
    if arguments.command == "serve":
        from eval.serve.command import check_installed

        check_installed()
    if arguments.command in ("bench", "generate", "chat", "serve", "train"):
        say_loading(settings.model)
    if arguments.command in (
        "bench",
        "generate",
        "serve",
        "train",
    ):  # chat does it where keys that are pressed meanwhile wait
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
        return run_generate(settings, arguments)
    if arguments.command == "train":
        from eval.train.command import options_from as train_options_from
        from eval.train.command import train

        return train(settings, train_options_from(arguments), arguments.json)
    if arguments.command == "serve":
        from eval.serve.command import options_from, serve

        return serve(settings, options_from(arguments))
    if arguments.command == "learned":
        from eval.use.learned import learned

        a = arguments
        return learned(a.model, a.texts, a.erase, a.yes, a.json)
    if arguments.command == "plan":
        return run_plan(arguments)
    if arguments.command in ("export", "models", "show", "pull", "remove"):
        return run_files(arguments)
    from eval.chat.command import chat

    a = arguments
    learn = a.learn_limit if a.learn else None
    return chat(settings, a.dashboard, not a.plain, not a.no_history, a.image_tokens, a.frames, learn)


def run_generate(settings: GenerationSettings, a: argparse.Namespace) -> int:
    """Run `run.py generate`. Raises ValueError: see `eval.chat.answer.answer`."""
    from eval.chat.answer import Question, answer
    from eval.chat.media import MediaOptions

    files = tuple((kind, path) for kind in ("image", "video", "audio") for path in getattr(a, kind))
    question = Question(a.prompt, a.raw, files, MediaOptions(a.image_tokens, a.frames, not a.no_sound))
    return answer(settings, question, not a.no_speculation, a.stats, a.json)


def run_files(a: argparse.Namespace) -> int:
    """Run a command about files. Raises ValueError: see `eval.files.models` and `eval.files.export`."""
    if a.command == "export":
        from eval.files.export import export

        return export(a.head, a.model, a.out, a.type, a.json)
    from eval.files import models

    if a.command == "models":
        return models.models(a.json)
    if a.command == "remove":
        return models.remove(a.name, a.yes)
    return (models.show if a.command == "show" else models.pull)(a.name, a.json)


def run_plan(a: argparse.Namespace) -> int:
    """Run `run.py plan`. Raises ValueError: the budget is no amount of memory, the device is none that has a memory of
    its own, or see `eval.plan.plan`."""
    import torch

    from eval.plan import Asked, plan
    from specdec.memory.plan import parse_bytes
    from specdec.util.device import named_device

    budget, device = None if a.budget is None else parse_bytes(a.budget), named_device(a.device)
    if device.type == "mps":
        raise ValueError("a Mac's GPU computes in the machine's memory: plan it with --device cpu")
    dtype = a.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    stored = (a.model, a.drafter, a.quantize, getattr(torch, dtype))
    adapters = tuple(path for _, path in a.adapter)
    media = (a.picture, a.frames)
    return plan(Asked(*stored, a.context, budget, a.kv_dtype or dtype, *media, adapters, str(device)), a.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `run.py` with the words `argv` (None: the process's own); return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    # No command means bench, so that `run.py` and `run.py --limit 1` do the main job; --help stays the overview.
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["bench", *words]
    arguments = parser(*{words[0]} & {*COMMANDS}).parse_args(words)
    from eval.cli.output import run_guarded

    outputs = (getattr(arguments, name, None) for name in ("json", "prometheus", "out"))
    return run_guarded(lambda: run(arguments), *outputs)


if __name__ == "__main__":
    sys.exit(main())
