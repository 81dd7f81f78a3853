"""The report's first figures, by which a run is judged: the overview, and speed-ups by mode, task and run. Also the
parts of all figures: `figure`, `bar`, `tag`, `verdict`, `key_of`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from eval.cli.words import DISTURBED, count_noun, repetitions
from eval.report.charts import (
    NONE,
    Bar,
    BarMark,
    Drawing,
    Html,
    Part,
    bars,
    collapsible,
    count,
    element,
    fill,
    format_percent,
    join_parts,
    legend,
    longest,
    svg,
    table,
    times,
)
from eval.report.record import Node, RecordedRun

SYNTHETIC = element("b", "SYNTHETIC", class_="synthetic")
_EVEN = BarMark(1.0, "1.0x")


def _some(nodes: Sequence[Node], most: int = 6) -> str:
    names = [node.shown for node in nodes]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def verdict(identical: object) -> Html:
    """Return "yes", "NO" or "not compared", for the record's True, False and anything else."""
    if not isinstance(identical, bool):
        return element("span", "not compared", class_="faint")
    return element("strong", "yes" if identical else "NO", class_="yes" if identical else "no")


def tag(run: RecordedRun) -> Html:
    """Return the run's letter and label, and whether its figures are synthetic; nothing for one real run alone."""
    said = [element("b", run.letter, class_="letter"), " ", element("span", run.label)] if run.letter else []
    if run.synthetic:
        said += [" ", SYNTHETIC]
    return element("p", *said, class_="tag") if said else Html()


def figure(
    name: str,
    title: str,
    drawings: Sequence[tuple[str, Drawing]],
    figures: Html,
    *notes: Html,
    run: RecordedRun | None = None,
    wide: bool = False,
    beside: bool = False,
) -> Html:
    """Return charts, each below its heading where it has one, and the same `figures` as a table.

    `beside`: the table stands unfolded beside the charts. Without drawings the table stands alone.
    """
    charts = []
    for number, (heading, drawing) in enumerate(drawings, start=1):
        whole = ", ".join(filter(None, (title, heading, run.label if run else "")))
        above = element("h4", heading) if heading else ""
        charts.append(element("div", above, svg(f"{name}-chart-{number}", whole, drawing)))
    drawn = element("div", *charts, class_="charts")
    folding = collapsible("The same as a table", figures, open_=beside)
    body = element("div", drawn, folding, class_="beside" if beside else "below") if charts else figures
    return element(
        "section",
        element("h3", title),
        tag(run) if run else "",
        *notes,
        body,
        id=name,
        class_="card wide" if wide else "card",
    )


def flags(run: RecordedRun) -> list[Html]:
    """Return the warnings that a reader needs before the figures."""
    record, said = run.record, []
    if run.synthetic:
        asked = record["synthetic_acceptance"].shown
        text = f"drafts were right as often as was asked for ({asked}); no drafter did this."
        said.append(element("p", SYNTHETIC, f": {text}", class_="flag"))
    if record["interrupted"].value is True:
        said.append(element("p", "Interrupted: these are the figures of what was finished.", class_="flag"))
    if error := record["error"].text:
        said.append(element("p", f"Ended by an error, with figures of what was finished: {error}", class_="flag"))
    if (cores := record["others_cpu"].number or 0.0) > DISTURBED:
        text = f"These timings are unreliable: waiting engines used {cores:.2f} cores while another was timed."
        said.append(element("p", text, class_="flag"))
    if names := _some(record["implausible"].nodes):
        text = (
            f"These timings are unreliable: {names} sped up by more than acceptance can give, so something else slowed "
            "the plain run down. Run it again on an idle machine."
        )
        said.append(element("p", text, class_="flag"))
    if names := _some(record["differing"].nodes):
        said.append(element("p", f"Texts that differ: {names}.", class_="flag"))
    return said


def overview(run: RecordedRun) -> Html:
    """Return the card of a run: its speed-up, whether texts are identical, warnings, and up to ten facts."""
    record, best = run.record, run.best
    same, prompts, tasks = (
        record["identical"].value,
        record["prompts"].number,
        [task for task in record["tasks"].nodes if task.text],
    )
    shown, state = ("YES", "yes") if same is True else ("NO", "no") if same is False else (NONE, "unknown")
    alike = None if prompts is None or same is None else prompts - len(record["differing"].nodes)
    texts = "" if alike is None else f", {count(alike)} of {count(prompts)} texts"
    slowest = min(record["per_prompt"].nodes, key=lambda prompt: _speedup_of(prompt, run.name), default=Node())
    worst = slowest["name"].text if math.isfinite(_speedup_of(slowest, run.name)) else ""
    plain = (run.modes or [Node()])[0]
    facts = [
        ("Median prompt", times(run.figure_of_best("speedup_median"))),
        ("Worst prompt", ", ".join(filter(None, (times(run.figure_of_best("speedup_lowest")), worst)))),
        ("Plain", fill("{:.1f} tokens/s", plain["tokens_per_second"].number)),
        ("Drafted", NONE if best.value is plain.value else fill("{:.1f} tokens/s", best["tokens_per_second"].number)),
        ("Tokens a round", fill("{:.2f}", best["mean_acceptance_length"].number)),
        ("Drafts accepted", format_percent(best["acceptance_rate"].number)),
        ("Prompts", f"{count(prompts)}, of {count_noun(len(tasks), 'task')}" if tasks and prompts else count(prompts)),
        ("Medians of", repetitions(record.value if isinstance(record.value, dict) else {}) or NONE),
        ("Model", record["model"]["name"].text or NONE),
        ("Drafter", record["model"]["drafter"].text or NONE),
    ]
    speed = [
        element("strong", times(run.figure_of_best("speedup"))),
        f"{run.name or 'nothing'} over plain, all prompts",
    ]
    named = [element("b", run.letter, class_="letter"), " "] if run.letter else []
    named += [run.label, *([" ", SYNTHETIC] if run.synthetic else [])]
    return element(
        "article",
        element("h3", *named),
        element(
            "div",
            element("p", *speed, class_="big"),
            element("p", element("strong", shown), f"output identical{texts}", class_=f"big {state}"),
            class_="headline",
        ),
        element("div", *flags(run), class_="flags"),
        element(
            "dl", *(element("div", element("dt", k), element("dd", v)) for k, v in facts if v != NONE), class_="facts"
        ),
        id=run.id("run"),
        class_="card",
    )


def _speedup_of(prompt: Node, mode: str) -> float:
    value = prompt["modes"][mode]["speedup"].number
    return math.inf if value is None else value


def tone(run: RecordedRun, mode: Node) -> str:
    """Return the colour of a mode's bar: the headline mode, others of ours, other engines (whose texts are not
    compared)."""
    return "main" if mode["mode"].text == run.name else "engine" if mode["identical"].value is None else "rest"


def _tones(run: RecordedRun, modes: Sequence[Node]) -> Html:
    named = {"main": run.name, "rest": "other modes", "engine": "other engines"}
    used = {tone(run, mode) for mode in modes}
    return legend([(key, text) for key, text in named.items() if key in used]) if len(used) > 1 else Html()


def bar(label: str, value: float, text: str, tone: str = "main") -> Bar:
    """Return a bar of one part."""
    return Bar(label, (Part(value, tone),), text)


def by_repetition(mode: Node) -> Html:
    """Return tokens per second, and in small print those of the slowest and the fastest repetition."""
    ends = [fill("{:.1f}", mode["spread"][end].number) for end in ("lowest", "highest")]
    small = [element("small", " to ".join(ends))] if NONE not in ends and ends[0] != ends[1] else []
    return join_parts([fill("{:.1f}", mode["tokens_per_second"].number), *small])


def per_round(mode: Node) -> float | None:
    """Return the tokens a round; None for an engine that does not tell its rounds."""
    return mode["mean_acceptance_length"].number if mode["rounds"].number else None


def by_mode(run: RecordedRun) -> Html:
    """Return the figure of speed-ups by mode, with a column for each figure that some mode has."""
    modes = run.modes
    every: list[tuple[str, Callable[[Node], str]]] = [
        ("Mode", lambda mode: join_parts([mode["mode"].text, element("small", mode["details"].text)])),
        ("Speed\u2011up", lambda mode: times(mode["speedup"].number)),  # not to be broken in two
        ("Median prompt", lambda mode: times(mode["speedup_median"].number)),
        ("Worst prompt", lambda mode: times(mode["speedup_lowest"].number)),
        ("Tokens/s, by repetition", by_repetition),
        ("Tokens/s after the first", lambda mode: fill("{:.1f}", mode["decode_tokens_per_second"].number)),
        ("Prefill tokens/s", lambda mode: count(mode["prefill_tokens_per_second"].number)),
        ("Tokens a round", lambda mode: fill("{:.2f}", per_round(mode))),
        ("Accepted", lambda mode: format_percent(mode["acceptance_rate"].number if mode["drafted"].number else None)),
        ("Identical", lambda mode: NONE if mode.value is modes[0].value else verdict(mode["identical"].value)),
    ]
    columns = [(name, cells) for name, show in every if {NONE} != {*(cells := [show(mode) for mode in modes])}]
    figures = table(
        "Speed by mode", [name for name, _ in columns], list(zip(*(cells for _, cells in columns), strict=True))
    )
    drawn = [(mode, value) for mode in run.modes[1:] if (value := mode["speedup"].number) is not None]
    shown = [bar(mode["mode"].text, value, times(value), tone(run, mode)) for mode, value in drawn]
    key = _tones(run, [mode for mode, _ in drawn])
    charts = [("", bars([("", shown)], _EVEN))] if shown else []
    alone = not run.letter
    title = "Speed-up by mode"
    return figure(run.id("modes"), title, charts, figures, key, run=run, wide=alone, beside=alone) if modes else Html()


def _tasks_of(run: RecordedRun) -> list[str]:
    return list(dict.fromkeys(task for mode in run.modes[1:] for task, _ in mode["by_task"].items))


def panels(groups: Sequence[tuple[str, Sequence[Bar]]]) -> list[tuple[str, Drawing]]:
    """Return a chart for each group, on one scale."""
    most = longest(groups, _EVEN)
    return [(name, bars([("", some)], _EVEN, most)) for name, some in groups if some]


def by_task(run: RecordedRun) -> Html:
    """Return the figure of speed-ups by task and mode."""
    groups, rows = [], []
    modes = [mode for mode in run.modes[1:] if mode["by_task"].items]
    for task in _tasks_of(run):
        drawn = []
        for mode in modes:
            found = mode["by_task"][task]
            if (value := found["speedup"].number) is not None:
                drawn.append(bar(mode["mode"].text, value, times(value), tone(run, mode)))
            rate = fill("{:.1f}", found["tokens_per_second"].number)
            lowest = times(found["speedup_lowest"].number)
            rows.append([task or NONE, mode["mode"].text, count(found["prompts"].number), rate, times(value), lowest])
        groups.append((task or NONE, drawn))
    head = ["Task", "Mode", "Prompts", "Tokens/s", "Speed-up", "Worst prompt"]
    figures, key = table("Speed-up by task", head, rows), _tones(run, modes)
    drawings = panels(groups)
    return figure(run.id("tasks"), "Speed-up by task", drawings, figures, key, run=run, wide=True) if rows else Html()


def compare_runs(runs: Sequence[RecordedRun]) -> list[Html]:
    """Return each run's first mode beside the others', by task."""
    if len(runs) < 2:
        return []
    named = [f"{run.letter} {run.name}{' SYNTHETIC' if run.synthetic else ''}" for run in runs]
    tasks = list(dict.fromkeys(task for run in runs for task in _tasks_of(run)))
    found = [("all prompts", [run.figure_of_best("speedup") for run in runs])]
    found += [(task or NONE, [run.best["by_task"][task]["speedup"].number for run in runs]) for task in tasks]
    groups = []
    for task, values in found:
        there = [(run, name, value) for run, name, value in zip(runs, named, values, strict=True) if value is not None]
        groups.append((task, [bar(name, value, times(value), run.tone) for run, name, value in there]))
    rows = [[task, *map(times, values)] for task, values in found]
    figures = table("Speed-up by task and run", ["Task", *named], rows)
    return [figure("compared", "Runs compared, by task", panels(groups), figures, key_of(runs), wide=True)]


def key_of(runs: Sequence[RecordedRun]) -> Html:
    """Return the legend of the runs' letters and colours; nothing for one run alone."""
    named = [(run.tone, f"{run.letter} {run.label}{', SYNTHETIC' if run.synthetic else ''}") for run in runs]
    return legend(named) if any(run.letter for run in runs) else Html()
