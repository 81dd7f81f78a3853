"""The report's figures behind the speed-up: drafts, latency, time, memory, prompts, settings and machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eval.report.charts import (
    NONE,
    Bar,
    BarMark,
    Html,
    Line,
    Part,
    bars,
    collapsible,
    count,
    duration,
    element,
    fill,
    format_percent,
    join_parts,
    legend,
    lines,
    size,
    table,
    times,
)
from eval.report.record import Node, RecordedRun
from eval.report.speed import bar, figure, key_of, verdict

_PHASES = ("prefill", "draft", "verify", "other")
_SPREAD = ("mean", "p50", "p95", "p99")


def acceptance(run: RecordedRun) -> Html:
    """Return the figure of acceptance by draft position: the best mode as bars, all modes in the table."""
    rows = [
        [
            mode["mode"].text,
            count(at["position"].number),
            format_percent(at["accepted"].number),
            count(at["reached"].number),
            format_percent(at["accepted_of_reached"].number),
        ]
        for mode in run.modes
        for at in mode["acceptance_by_position"].nodes
    ]
    head = ["Mode", "Position", "Accepted, of all rounds", "Drafts that reached it", "Accepted of those"]
    drawn = []
    for at in run.best["acceptance_by_position"].nodes:
        # Never more drafts reach a position than there are rounds, so the second share is the larger one.
        of_all, of_those = at["accepted"].number or 0.0, at["accepted_of_reached"].number or 0.0
        parts = (Part(of_all, "main"), Part(max(of_those - of_all, 0.0), "rest"))
        text = f"{format_percent(of_all)}, {format_percent(of_those)} of {count(at['reached'].number)}"
        drawn.append(Bar(count(at["position"].number), parts, text))
    charts = [("", bars([("", drawn)], most=1.0))] if drawn else []
    key = legend([("main", "accepted, of all rounds"), ("rest", "of the drafts that reached the position")])
    title = f"Acceptance by position, {run.name}"
    figures = table("Acceptance by position", head, rows)
    return figure(run.id("acceptance"), title, charts, figures, key, run=run) if rows else Html()


def draft_lengths(run: RecordedRun) -> Html:
    """Return the figure of rounds by draft length: the best mode as bars, all drafting modes in the table."""
    counts = [(m["mode"].text, {k: n for k, v in m["draft_lengths"].items if (n := v.number)}) for m in run.drafting]
    lengths = sorted({k for _, found in counts for k in found}, key=lambda k: (len(k), k))
    if not lengths:
        return Html()
    rows = [[name, *(count(found.get(k, 0)) for k in lengths)] for name, found in counts]
    best = dict(counts).get(run.name, {})
    total = sum(best.values()) or 1
    drawn = [
        bar(k, best.get(k, 0), f"{count(best.get(k, 0))} ({format_percent(best.get(k, 0) / total)})") for k in lengths
    ]
    charts = [("", bars([("", drawn)]))] if best else []
    figures = table("Rounds by tokens drafted", ["Mode", *lengths], rows)
    return figure(run.id("lengths"), f"Rounds by tokens drafted, {run.name}", charts, figures, run=run)


def sources(run: RecordedRun) -> Html:
    """Return the figure of drafted and accepted tokens by source."""
    rows, drawn = [], []
    for mode in run.drafting:
        name = mode["mode"].text
        for source, found in mode["draft_sources"].items:
            drafted, accepted = (*(node.number or 0.0 for node in found.nodes), 0.0, 0.0)[:2]
            rate = format_percent(accepted / drafted if drafted else None)
            rows.append([name, source, count(drafted), count(accepted), rate])
            if name == run.name:
                parts = (Part(accepted, "main"), Part(max(drafted - accepted, 0.0), "rest"))
                drawn.append(Bar(source, parts, f"{rate} of {count(drafted)}"))
    charts = [("", bars([("", drawn)]))] if drawn else []
    figures = table("Drafted tokens by source", ["Mode", "Source", "Drafted", "Accepted", "Share"], rows)
    key = legend([("main", "accepted"), ("rest", "drafted, not accepted")])
    title = f"Drafted tokens by source, {run.name}"
    return figure(run.id("sources"), title, charts, figures, key, run=run) if rows else Html()


def _in_ms(seconds: float | None) -> str:
    return NONE if seconds is None else f"{1000 * seconds:,.{0 if seconds >= 1 else 1 if seconds >= 0.01 else 2}f}"


def latency(run: RecordedRun) -> Html:
    """Return the tables of TTFT, ITL and TPOT, in ms; a kind that no mode tells is left out."""
    kinds = (
        ("ttft", "TTFT", "Milliseconds to the first token."),
        ("itl", "ITL", "Milliseconds between deliveries: tokens accepted together come together."),
        ("tpot", "TPOT", "Milliseconds per token after the first."),
    )
    made = []
    for key, short, meaning in kinds:
        found = [mode for mode in run.modes if mode[key]["p50"].number is not None]
        rows = [[mode["mode"].text, *(_in_ms(mode[key][name].number) for name in _SPREAD)] for mode in found]
        if rows:
            note = element("p", meaning, class_="note")
            made.append(
                figure(run.id(key), short, [], table(f"{short}: {meaning}", ["Mode", *_SPREAD], rows), note, run=run)
            )
    return join_parts(made)


def rounds(run: RecordedRun) -> Html:
    """Return the figure of each mode's seconds by phase."""
    rows, drawn = [], []
    for mode in run.modes:
        seconds = [mode["phase_seconds"][phase].number for phase in _PHASES]
        if any(value is not None for value in seconds):
            known = [max(value or 0.0, 0.0) for value in seconds]
            total = sum(known)
            parts = [
                (value, phase, format_percent(value / total if total else 0.0))
                for value, phase in zip(known, _PHASES, strict=True)
            ]
            name, together = mode["mode"].text, duration(total)
            rows.append([name, *(f"{duration(value)} ({of_total})" for value, _, of_total in parts), together])
            drawn.append(Bar(name, tuple(Part(*part) for part in parts), together))
    if not rows:
        return Html()
    title, key = "Seconds by part of a round", legend([(phase, phase) for phase in _PHASES])
    figures = table(title, ["Mode", *_PHASES, "together"], rows)
    return figure(run.id("rounds"), title, [("", bars([("", drawn)]))], figures, key, run=run)


def costs(runs: Sequence[RecordedRun]) -> list[Html]:
    """Return the figure of costs: V(T), the time of a pass by its rows, in all runs together; and d, that of a drafted
    token."""
    found: list[tuple[RecordedRun, dict[int, float]]] = []
    notes: list[Html] = []
    for run in runs:
        told = run.record["costs"]
        passes = {int(k): v.number for k, v in told["pass_seconds"].items if k.isdecimal() and len(k) < 7}
        if not (known := {k: v for k, v in sorted(passes.items()) if v is not None}):
            continue
        found.append((run, known))
        whose, one = f"{run.letter}: " if run.letter else "", known.get(1)
        for name, node in told["draft_seconds"].items:
            if (d := node.number) is not None:
                ratio = f", {d / one:.3f} of V(1)" if one else ""
                notes.append(element("li", f"{whose}d of {name} = {duration(d)} a drafted token{ratio}"))
    if not found:
        return []
    drawn = [Line(r.letter or "V", r.tone, tuple((n, 1000 * v) for n, v in known.items())) for r, known in found]
    every = sorted({rows for _, known in found for rows in known})
    rows = [[str(n), *(duration(known.get(n)) for _, known in found)] for n in every]
    figures = table("Seconds of a pass by its rows", ["Rows", *(run.letter or "V(T)" for run, _ in found)], rows)
    chart = lines(drawn, "rows in a pass, T", "milliseconds of a pass, V(T)", "{:.1f}".format)
    listed = element("ul", *notes, class_="note") if notes else Html()
    return [figure("costs", "Cost of a pass", [("", chart)], figures, key_of([run for run, _ in found]), listed)]


def memory(runs: Sequence[RecordedRun]) -> list[Html]:
    """Return a figure for each run: weights, context, and the most that was taken; one scale for all runs."""
    wanted: list[tuple[RecordedRun, list[tuple[str, float]], float | None]] = []
    for run in runs:
        known, cache = run.record["memory"], [mode["cache_bytes"].number or 0.0 for mode in run.modes]
        all_of = [
            ("process, at most", known["process"].number),
            ("device, at most", known["device"].number),
            ("weights", run.record["model"]["weight_bytes"].number),
            ("context", max(cache, default=0.0) or None),
        ]
        if there := [(name, value) for name, value in all_of if value is not None]:
            wanted.append((run, there, known["budget"].number))
    most = max([value for _, there, budget in wanted for value in (*(v for _, v in there), budget or 0.0)], default=0.0)
    made = []
    for run, there, budget in wanted:
        mark = BarMark(budget, f"budget {size(budget)}") if budget else None
        chart = bars([("", [bar(name, value, size(value)) for name, value in there])], mark, most)
        rows = [[name, size(value), format_percent(value / budget if budget else None)] for name, value in there]
        rows += [["budget", size(budget), NONE]] if budget else []
        figures = table("Memory", ["", "Bytes", "Of the budget"], rows)
        made.append(figure(run.id("memory"), "Memory", [("", chart)], figures, run=run))
    return made


def prompts(run: RecordedRun) -> Html:
    """Return the table of all prompts, which a click on a heading sorts."""
    names = [mode["mode"].text for mode in run.modes[1:]]
    rows = []
    for prompt in run.record["per_prompt"].nodes:
        modes = prompt["modes"]
        rows.append(
            [
                prompt["name"].text or NONE,
                prompt["task"].text or NONE,
                count(prompt["prompt_tokens"].number),
                count(prompt["tokens"].number),
                *(times(modes[name]["speedup"].number) for name in names),
                fill("{:.2f}", modes[run.name]["mean_acceptance_length"].number),
                verdict(prompt["identical"].value),
            ]
        )
    head = ["Prompt", "Task", "Prompt tokens", "Tokens", *names, "Tokens a round", "Identical"]
    caption = f"Speed-up of every prompt by mode; tokens a round of {run.name}"
    figures = collapsible(f"{len(rows)} prompts", table(caption, head, rows, "sortable"), open_=not run.letter)
    return figure(run.id("prompts"), "Every prompt", [], figures, run=run, wide=True) if rows else Html()


def _describe_setting(key: str, node: Node) -> str:
    return size(node.number) if key.endswith("bytes") and node.number is not None else node.shown


def settings(runs: Sequence[RecordedRun]) -> list[Html]:
    """Return the settings and the machine of each run: a column per run, and a mark where runs differ."""
    more = ("prompts_file", "limit", "repeat", "synthetic_acceptance")
    kinds: tuple[tuple[str, str, Callable[[Node], list[tuple[str, Node]]]], ...] = (
        (
            "settings",
            "Settings",
            lambda r: [*r["arguments"].items, *((k, r[k]) for k in more if r[k].value is not None)],
        ),
        (
            "machine",
            "Machine and model",
            lambda r: [*r["host"].items, *((f"model {k}", v) for k, v in r["model"].items)],
        ),
        ("versions", "Versions", lambda r: r["versions"].items),
    )
    made = []
    for name, title, rows_of in kinds:
        columns = [{key: _describe_setting(key, node) for key, node in rows_of(run.record)} for run in runs]
        rows = []
        for key in dict.fromkeys(key for column in columns for key in column):
            values = [column.get(key, NONE) for column in columns]
            differ = [" ", element("span", "differs", class_="differs")] if len(set(values)) > 1 else []
            rows.append([join_parts([key.replace("_", " "), *differ]), *values])
        if rows:
            head = ["", *(run.letter or "Value" for run in runs)]
            made.append(figure(name, title, [], table(title, head, rows, "words"), wide=len(runs) > 2))
    return made
