"""The tables of a bench, from its record alone, so that a file can be shown as well as a run. 80 columns suffice; in
fewer columns no figure is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.cli.figure_table import Column, FigureTable
from eval.cli.metrics import NOISE, graphs_text
from eval.cli.names import PLAIN
from eval.cli.words import DISTURBED, count_noun, repetitions
from eval.live.parts import format_percent, milliseconds, position_table, size, yes_or_no

MOST_PROMPTS = 24  # rows; of more prompts only the slowest are listed
SLOWEST = 8

Record = dict[str, Any]


def show(console: Console, title: str, record: Record) -> None:
    """Print all tables and notes of a finished bench."""
    rows, headline = record["per_prompt"], record["headline"]
    if not rows:
        console.print("nothing was finished")
        return
    console.print()
    if console.is_terminal and len(rows) <= MOST_PROMPTS:  # elsewhere every prompt has had its line
        console.print(title, style="bold", highlight=False)
        console.print(prompt_table(rows, headline), "")
    elif len(rows) > MOST_PROMPTS and headline != PLAIN:
        slowest = sorted(rows, key=lambda row: row["modes"][headline]["speedup"])[:SLOWEST]
        console.print(f"the {SLOWEST} prompts that {headline} speeds up least", style="bold", highlight=False)
        console.print(prompt_table(slowest, headline), "")
    if len(record["tasks"]) > 1 and len(rows) > len(record["tasks"]):
        console.print(task_table(record), "")
    if len(record["modes"]) > 2:
        console.print(mode_table(record), "")
    console.print(summary_table(record), "")
    if positions := _mode(record, headline)["acceptance_by_position"]:
        console.print(position_table(positions), "")
    for text, style in notes(record):
        console.print(text, style=style, highlight=False, markup=False)


def prompt_table(rows: Sequence[Record], headline: str) -> FigureTable:
    """Return a table with one row per prompt, of a record's `per_prompt`: plain beside `headline`."""
    table = FigureTable(
        "prompt",
        [
            Column("tokens", 1),
            Column("plain/s", 4),
            Column(f"{headline}/s", 5),
            Column("speed-up", 7),
            Column("length", 3),
            Column("accepted", 2),
            Column("same", 6, "center"),
        ],
        whole=False,
    )
    for row in rows:
        mode = row["modes"][headline]
        cells = (
            str(row["tokens"]),
            f"{_rate(row, PLAIN):.1f}",
            f"{_rate(row, headline):.1f}",
            speedup_text(mode["speedup"]),
            f"{mode['mean_acceptance_length']:.2f}",
            format_percent(mode["acceptance_rate"]) if mode["acceptance_rate"] else "-",
            yes_or_no(row["identical"]),
        )
        table.add(row["name"], cells)
    return table


def task_table(record: Record) -> FigureTable:
    """Return the speed-ups by task: of the headline mode, of its slowest prompt, and against the best fixed length."""
    headline = _mode(record, record["headline"])
    fixed = [mode for mode in record["modes"] if mode["mode"][:1] == "k" and mode is not headline]
    columns = [Column("prompts", 1), Column("plain/s", 2), Column("speed-up", 6), Column("slowest", 5)]
    if fixed:
        columns += [Column("best\nfixed", 3), Column("to it", 4)]
    table = FigureTable("", columns, title=f"{headline['mode']}, by task")
    for task, figures in headline["by_task"].items():
        cells: list[Any] = [
            str(figures["prompts"]),
            f"{_mode(record, PLAIN)['by_task'][task]['tokens_per_second']:.1f}",
            speedup_text(figures["speedup"]),
            speedup_text(figures["speedup_lowest"]),
        ]
        if fixed:
            best = max(fixed, key=lambda mode: float(mode["by_task"][task]["speedup"]))
            of_best = best["by_task"][task]["speedup"]
            cells += [f"{best['mode']} {of_best:.2f}x", speedup_text(figures["speedup"] / of_best)]
        table.add(task or "-", cells)
    return table


def mode_table(record: Record) -> FigureTable:
    """Return a table with one row per mode."""
    prefill = any(mode["prefill_tokens_per_second"] for mode in record["modes"])
    table = FigureTable(
        "mode",
        [
            Column("tokens/s", 7),
            Column("lowest to\nhighest", 1),
            Column("speed-up", 8),
            Column("slowest\nprompt", 5),
            Column("length", 3),
            Column("prefill/s" if prefill else "TTFT", 2),
            Column("same", 6, "center"),
        ],
        caption=f"medians of {repetitions(record)}; {count_noun(record['prompts'], 'prompt')}, "
        f"{count_noun(record['host']['threads'], 'thread')}",
    )
    for mode in record["modes"]:
        last = mode["prefill_tokens_per_second"]
        cells = (
            f"{mode['tokens_per_second']:.1f}",
            Text(f"{mode['spread']['lowest']:.0f} {mode['spread']['highest']:.0f}", style="dim"),
            *(speedup_text(mode[name]) for name in ("speedup", "speedup_lowest")),
            f"{mode['mean_acceptance_length']:.2f}" if mode["drafted"] and mode["itl"] else "-",
            (f"{last:.0f}" if last else "-") if prefill else milliseconds(mode["ttft"]["p50"]),
            "-" if mode["identical"] is None else yes_or_no(mode["identical"]),
        )
        table.add(mode["mode"], cells)
    return table


def summary_table(record: Record) -> Table:
    """Return plain beside the headline mode, in full."""
    plain, mode, memory = _mode(record, PLAIN), _mode(record, record["headline"]), record["memory"]
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in (PLAIN, mode["mode"]):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")

    def row(name: str, figure: Callable[[Record], str], note: str = "") -> None:
        table.add_row(name, figure(plain), figure(mode), Text(note, style="dim"))

    row("tokens/s", lambda f: f"{f['tokens_per_second']:.1f}", "prefill included")
    row("tokens/s after the first", lambda f: f"{f['decode_tokens_per_second']:.1f}")
    row("time to first token", lambda f: milliseconds(f["ttft"]["p50"]), "TTFT, median")
    row("per token after it", lambda f: milliseconds(f["tpot"]["p50"]), "TPOT, median")
    if mode["itl"]:
        row("between deliveries", lambda f: milliseconds(f["itl"]["p50"]), "ITL, median")
        row("", lambda f: milliseconds(f["itl"]["p99"]), "ITL, 99th percentile")
    note = f"median {mode['speedup_median']:.2f}x, lowest {mode['speedup_lowest']:.2f}x"
    table.add_row("speed-up", "", speedup_text(mode["speedup"], "bold "), Text(note, style="dim"))
    length = f"{mode['mean_acceptance_length']:.2f}"
    table.add_row("mean acceptance length", "", length, Text("tokens per round", style="dim"))
    counts = f"{mode['accepted']:,} of {mode['drafted']:,} drafted tokens"
    rate = format_percent(mode["acceptance_rate"]) if mode["drafted"] else "-"
    table.add_row("acceptance rate", "", rate, Text(counts, style="dim"))
    if mode["overhead"] is not None:
        phases = mode["phase_seconds"]
        rounds = max(sum(phases[name] for name in ("draft", "verify", "other")), 1e-9)
        draft, verify = (format_percent(phases[name] / rounds) for name in ("draft", "verify"))
        parts = f"draft {draft}, verify {verify} of a round"
        table.add_row("overhead", "", f"{100 * mode['overhead']:.1f}%", Text(parts, style="dim"))
    if memory["process"] is not None:
        of = f"of a budget of {size(memory['budget'])}" if memory["budget"] else "of the process, all modes"
        table.add_row("peak memory", "", size(memory["process"]), Text(of, style="dim"))
    if memory["device"] is not None:
        table.add_row("peak device memory", "", size(memory["device"]), Text("allocated by torch", style="dim"))
    same = record["prompts"] - len(record["differing"])
    texts = f"{same} of {record['prompts']} texts, token for token"
    table.add_row("identical", "", yes_or_no(record["identical"]), Text(texts, style="dim"))
    lines = [f"kernels: {record['host']['kernels']}", *_cost_lines(record["costs"])]
    lines += [text] if (text := graphs_text(mode.get("graphs", {}))) else []
    table.caption, table.caption_justify = Text("\n".join(lines), style="dim"), "left"
    return table


def notes(record: Record) -> list[tuple[str, str]]:
    """Return the notes beside the tables, each with a style: whether figures can be trusted, and which texts differ."""
    found: list[tuple[str, str]] = []
    if record["synthetic_acceptance"]:
        found.append(("SYNTHETIC: drafts were right as often as was asked for; no drafter did this.", "yellow"))
    unsure = "These timings are not reliable:"
    if record["implausible"]:
        found.append(
            (
                f"{unsure} {', '.join(record['implausible'])} sped up by more than acceptance can give (tokens per "
                "round), so something else slowed the plain run down. Run it again on an idle machine.",
                "yellow",
            )
        )
    uneven = [m["mode"] for m in record["modes"] if m["spread"]["highest"] > NOISE * m["spread"]["lowest"]]
    if uneven:
        found.append(
            (
                f"{unsure} from one repetition to another {', '.join(uneven)} differed by more than {NOISE:g}x, so "
                "something else used the machine. Run it again when nothing else does.",
                "yellow",
            )
        )
    if record["others_cpu"] > DISTURBED:
        waiting = f"waiting engines used {record['others_cpu']:.2f} cores while another was timed."
        found.append((f"{unsure} {waiting}", "yellow"))
    if any(mode["identical"] is None for mode in record["modes"]):
        found += [(f"{mode['mode']}: {mode['details']}", "dim") for mode in record["modes"]]
    for row in record["per_prompt"]:
        for name, at in row["first_differences"].items():
            found.append((f"{row['name']}: {name} differs from plain from new token {at + 1} on", "bold red"))
    return found


def speedup_text(value: float, style: str = "") -> Text:
    """Return a speed-up in words: green from 1.02 on, red below 0.98. `style`: words of rich's before the colour."""
    colour = "green" if value >= 1.02 else "red" if value < 0.98 else "white"
    return Text(f"{value:.2f}x", style=f"{style}{colour}")


def _mode(record: Record, name: str) -> Record:
    found: Record = next(mode for mode in record["modes"] if mode["mode"] == name)
    return found


def _rate(row: Record, mode: str) -> float:
    seconds = float(row["modes"][mode]["seconds"])
    return float(row["tokens"]) / seconds if seconds > 0 else 0.0


def _cost_lines(costs: Record | None) -> list[str]:
    if not costs:
        return []
    passes = {int(rows): float(seconds) for rows, seconds in costs["pass_seconds"].items()}
    first = passes[1]
    others = " ".join(f"{seconds / first:.2f}" for rows, seconds in sorted(passes.items()) if rows > 1)
    steps = "".join(f", a {name} token {seconds / first:.2f}" for name, seconds in costs["draft_seconds"].items())
    return [f"a pass of one row {milliseconds(first)}; of 2 to {max(passes)}: {others} of that{steps}"]
