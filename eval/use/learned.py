"""`run.py learned`: how much chat and serve have kept with `--learn`, the texts themselves, and their deletion."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import specdec
from drafter.use.log import UseLog, UseText, use_folder, use_logs
from eval.cli.output import check_writable, put_record
from specdec.util.terminal import Terminal
from specdec.util.text import did_you_mean, printable
from specdec.weights.metadata import one_line


def learned(model: str | None, texts: int | None, erase: bool, sure: bool, json_file: Path | None) -> int:
    """Print what is kept, of `model` or of all; `texts`: with so many of the newest conversations. `erase`: delete it;
    ask first, unless `sure`. Return the exit code.

    Raises ValueError: nothing is kept of such a model, its tokenizer cannot be loaded, or nobody can be asked.
    """
    check_writable(json_file)
    logs = use_logs(use_folder())
    if model is not None:
        names = [log.model.name for log in logs]
        logs = [log for log in logs if log.model.name == model]
        if not logs:
            raise ValueError(f"{model}: nothing is kept of a model of this name.{did_you_mean(model, names)}")
    console, records = Terminal(highlight=False), []
    found = [(log, *log.texts()) for log in logs]
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in ("model", "adapter", "conversations", "tokens", "of last answers", "MB", "from", "to"):
        table.add_column(name, justify="left" if name in ("model", "adapter", "from", "to") else "right")
    for log, kept, wrong in found:
        record = _about(log, kept, wrong)
        records.append(record)
        figures = (f"{record[name]:,}" for name in ("conversations", "tokens", "answered"))
        span = (_day(record[name]) for name in ("oldest", "newest"))
        table.add_row(
            one_line(log.model.name), one_line(log.model.adapter), *figures, f"{record['bytes'] / 1e6:.2f}", *span
        )
        for line in wrong:
            print(f"not readable: {line}", file=sys.stderr)
    if not found:
        console.print("nothing is kept; `chat --learn` and `serve --learn` keep conversations")
    else:
        console.print(table)
        console.print(f"in {use_folder()}", markup=False, soft_wrap=True)
    for log, kept, _ in found if texts else ():
        _show(console, log, kept[-(texts or 0) :])
    put_record(json_file, {"command": "learned", "folder": str(use_folder()), "models": records})
    return _erase(console, logs, sure) if erase and found else 0


def _about(log: UseLog, kept: list[UseText], wrong: list[str]) -> dict[str, Any]:
    stored = log.stored()
    return {
        "model": log.model.name,
        "adapter": log.model.adapter or None,
        "fingerprint": log.model.fingerprint,
        "conversations": len(kept),
        "tokens": sum(len(text.tokens) for text in kept),
        "answered": sum(len(text.tokens) - text.answer for text in kept),
        "bytes": stored.nbytes,
        "oldest": stored.oldest,
        "newest": stored.newest,
        "unreadable": len(wrong),
        "path": str(log.place),
    }


def _show(console: Console, log: UseLog, kept: list[UseText]) -> None:
    """Print conversations as the model read and wrote them, with the marks of the chat template."""
    tokenizer = specdec.load_tokenizer(log.model.name)
    for text in kept:
        console.print(
            f"\n[{_day(text.when)}, {len(text.tokens):,} tokens, {log.model.name}]", markup=False, style="dim"
        )
        console.print(printable(str(tokenizer.decode(text.tokens.tolist()))), markup=False, soft_wrap=True)


def _erase(console: Console, logs: list[UseLog], sure: bool) -> int:
    count = sum(log.stored().texts for log in logs)
    if not sure:
        if not sys.stdin.isatty():
            raise ValueError("learned --erase: nobody is there to be asked; say --yes")
        if input(f"delete these texts ({count:,} files)? [y/N] ").strip().lower() not in ("y", "yes"):
            return 0
    console.print(f"deleted {sum(log.erase() for log in logs):,} files")
    return 0


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
