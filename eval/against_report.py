"""From measured turns to the figures and the table of `bench --against`, and the view while it runs.

Pure but for the view: no model, no clock. The definitions are in `eval.against`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from eval.engines import DRAFTED, PLAIN, Timing
from eval.metrics import NOISE

DISTURBED = 0.05  # cores that waiting engines may use


@dataclass(frozen=True)
class Case:
    """Decode `tokens` tokens after the prompt `ids`; a single one is the prefill."""

    name: str
    ids: tuple[int, ...]
    tokens: int

    @property
    def counted(self) -> int:
        """Tokens whose time counts: those after the first, or of the prompt where one is all."""
        return self.tokens - 1 if self.tokens > 1 else len(self.ids)

    def seconds(self, timing: Timing) -> float:
        return timing.rest if self.tokens > 1 else timing.first


@dataclass(frozen=True)
class Turn:
    """What every engine (by name) took for one case in one repetition (from 1)."""

    repetition: int
    case: Case
    timings: dict[str, Timing]


def speed(turns: Sequence[Turn], engine: str) -> dict[str, float]:
    """`median`, `lowest` and `highest` tokens per second; zeros of nothing. `turns` are all decoding, or all prefill.

    Lowest and highest are of whole repetitions: an interrupted one did other work than the others.
    """
    by_case: dict[str, list[Turn]] = {}
    by_repetition: dict[int, list[Turn]] = {}
    for turn in turns:
        by_case.setdefault(turn.case.name, []).append(turn)
        by_repetition.setdefault(turn.repetition, []).append(turn)

    def seconds(turn: Turn) -> float:
        return turn.case.seconds(turn.timings[engine])

    tokens = sum(same[0].case.counted for same in by_case.values())
    median = _rate(tokens, sum(statistics.median(map(seconds, same)) for same in by_case.values()))
    whole = [ones for ones in by_repetition.values() if len(ones) == len(by_case)]
    rates = [_rate(tokens, sum(map(seconds, ones))) for ones in whole]
    return {"median": median, "lowest": min(rates, default=median), "highest": max(rates, default=median)}


def figures(turns: Sequence[Turn], engines: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Speeds and ratios of `engines` (name, details), in JSON types, and which of each kind to quote."""
    kinds = {
        "decode": [turn for turn in turns if turn.case.tokens > 1],
        "prefill": [turn for turn in turns if turn.case.tokens == 1],
    }
    speeds = {kind: {name: speed(some, name) for name, _ in engines} for kind, some in kinds.items()}
    return {
        "turns": len(turns),
        "repetitions": max((turn.repetition for turn in turns), default=0),
        "prompts": len({turn.case.name for turn in kinds["decode"]}),
        "prefill_tokens": max((len(turn.case.ids) for turn in kinds["prefill"]), default=0),
        "engines": [
            {
                "engine": name,
                "details": details,
                "decode_tokens_per_second": speeds["decode"][name],
                "prefill_tokens_per_second": speeds["prefill"][name],
                "plain_is": _ratio(speeds["decode"], PLAIN, name),
                "drafted_is": _ratio(speeds["decode"], DRAFTED, name),
                "prefill_is": _ratio(speeds["prefill"], PLAIN, name),
                "seconds": _seconds(turns, name),
            }
            for name, details in engines
        ],
        "quote": {kind: _fastest(of_kind) for kind, of_kind in speeds.items()},
    }


def table(record: dict[str, Any]) -> Table:
    """The record of `figures`, one row per engine; 80 columns suffice."""
    shown = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    shown.title, shown.title_justify = "against other engines, tokens/s", "left"
    shown.add_column("", no_wrap=True)
    for name in ("\ndecode", "lowest to\nhighest", "plain\nis", "drafted\nis", "\nprefill", "ours\nis"):
        shown.add_column(name, justify="right", no_wrap=True)
    quote = {kind: set(names.values()) for kind, names in record["quote"].items()}
    for row in record["engines"]:
        name, decode, prefill = row["engine"], row["decode_tokens_per_second"], row["prefill_tokens_per_second"]
        # The slower of two dtypes of one engine is there to be seen, not to be compared with.
        left = "" if name in quote["decode"] else "dim"
        right = "" if name in quote["prefill"] else "dim"
        shown.add_row(
            Text(name),
            Text(f"{decode['median']:.1f}", style=left),
            Text(f"{decode['lowest']:.1f} {decode['highest']:.1f}", style="dim"),
            Text(times(row["plain_is"]), style=left),
            Text(times(row["drafted_is"]), style=left),
            Text(f"{prefill['median']:.0f}", style=right),
            Text(times(row["prefill_is"]), style=right),
        )
    shown.caption_justify = "left"
    counts = ((record["repetitions"], "repetition"), (record["prompts"], "prompt"), (record["threads"], "thread"))
    counted = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts)
    advice = "\nof transformers' two rows the faster is the one to quote (bright)"
    two = sum(row["engine"].startswith("transformers") for row in record["engines"]) > 1
    shown.caption = Text(
        f"medians; {counted}; prefill of {record['prefill_tokens']} tokens{advice if two else ''}", style="dim"
    )
    return shown


def notes(record: dict[str, Any]) -> list[str]:
    """What to know beside the table: what each engine is, and whether the figures can be trusted."""
    lines = [f"{row['engine']}: {row['details']}" for row in record["engines"]]
    if record["others_cpu"] > DISTURBED:
        lines.append(
            f"These timings are not reliable: waiting engines used {record['others_cpu']:.2f} cores while another was "
            "timed."
        )
    uneven = [row["engine"] for row in record["engines"] if _uneven(row["decode_tokens_per_second"])]
    if uneven:
        lines.append(
            f"These timings are not reliable: from one repetition to another {', '.join(uneven)} differed by more than "
            f"{NOISE:g}x, so something else used the machine. Run it again when nothing else does."
        )
    return lines


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


@contextmanager
def view_for(console: Console, total: int) -> Iterator[Callable[[Turn], None]]:
    """What to call with every finished turn of `total`: a bar on a terminal, a line per turn elsewhere."""
    if not console.is_terminal:
        yield lambda turn: console.print(line(turn), highlight=False, markup=False, soft_wrap=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn between turns only: a thread that redraws would take its time from the engine that is being measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("warming up", total=total)
        bar.refresh()

        def advance(turn: Turn) -> None:
            bar.update(task, advance=1, description=f"repetition {turn.repetition}: {turn.case.name} done")
            bar.refresh()

        yield advance


def line(turn: Turn) -> str:
    """One finished turn in words: tokens per second by engine."""
    case = turn.case
    rates = (f"{name} {_rate(case.counted, case.seconds(t)):.1f}/s" for name, t in sorted(turn.timings.items()))
    return f"repetition {turn.repetition}, {case.name}: {', '.join(rates)}"


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def _uneven(rates: dict[str, float]) -> bool:
    return rates["highest"] > NOISE * rates["lowest"]


def _ratio(speeds: dict[str, dict[str, float]], ours: str, theirs: str) -> float | None:
    if ours not in speeds or not speeds[theirs]["median"]:
        return None
    return speeds[ours]["median"] / speeds[theirs]["median"]


def _fastest(speeds: dict[str, dict[str, float]]) -> dict[str, str]:
    """The fastest row of every engine: {"transformers": "transformers bfloat16", ...}; ours are all kept."""
    best: dict[str, str] = {}
    for name, rate in speeds.items():
        kind = name if name in (PLAIN, DRAFTED) else name.split()[0]
        if kind not in best or rate["median"] > speeds[best[kind]]["median"]:
            best[kind] = name
    return best


def _seconds(turns: Sequence[Turn], engine: str) -> dict[str, list[float]]:
    """Every measured time by case, in the order of the repetitions."""
    found: dict[str, list[float]] = {}
    for turn in turns:
        found.setdefault(turn.case.name, []).append(turn.case.seconds(turn.timings[engine]))
    return found
