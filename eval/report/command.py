"""`run.py report`: one HTML page of bench records, which needs no network and no other file.

What: `report` reads files, writes the page and prints its path; `page` makes the page, from the sections of
`eval.report.speed` and `eval.report.details`. Nothing of a record reaches the page unescaped (`eval.report.charts`),
and the page's policy lets its own script alone run.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib import resources
from pathlib import Path

from eval.cli.output import STDOUT, check_writable, put_text
from eval.report.charts import Html, element, times
from eval.report.details import acceptance, costs, draft_lengths, latency, memory, prompts, rounds, settings, sources
from eval.report.record import RecordedRun, label_runs, read
from eval.report.speed import by_mode, by_task, compare_runs, overview
from specdec.util.text import printable

DEFAULT = Path("report.html")
_GENERATOR = '<meta name="generator" content="specdec bench report">'
Maker = Callable[[Sequence[RecordedRun]], list[Html]]


def _each(make: Callable[[RecordedRun], Html]) -> Maker:
    return lambda runs: [made for run in runs if (made := make(run))]


# Name, title, description, and rows of figures: side by side run by run, or all runs in one.
SECTIONS: tuple[tuple[str, str, str, tuple[Maker, ...]], ...] = (
    ("overview", "Overview", "", (_each(overview),)),
    (
        "speed",
        "Speed-up",
        "Tokens per second of the whole call, prefill included, over plain decoding of the same prompts.",
        (compare_runs, _each(by_mode), _each(by_task)),
    ),
    (
        "drafts",
        "Drafts",
        "A round is one pass that checks a draft. A drafted token is kept where the model chooses the same.",
        (_each(acceptance), _each(draft_lengths), _each(sources)),
    ),
    ("latency", "Latency", "Mean and percentiles over all prompts.", (_each(latency),)),
    ("time", "Time and memory", "", (_each(rounds), costs, memory)),
    ("each", "Prompts", "", (_each(prompts),)),
    ("provenance", "Settings and machine", "", (settings,)),
)


def page(runs: Sequence[RecordedRun]) -> str:
    """Return the whole HTML file. The same runs make the same page."""
    shown, entries = [], []
    for name, title, about, makers in SECTIONS:
        rows = [row for make in makers if (row := make(runs))]
        if len(runs) == 1:
            rows = [[one for row in rows for one in row]] if rows else []
        if rows:
            lead = element("p", about, class_="lead") if about else Html()
            grids = [element("div", *row, class_="grid") for row in rows]
            shown.append(
                element(
                    "section", element("h2", title, id=f"{name}-h"), lead, *grids, id=name, aria_labelledby=f"{name}-h"
                )
            )
            entries.append(element("li", element("a", title, href=f"#{name}")))
    style, script = _own("report.css"), _own("report.js")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    only = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    about = f"{len(runs)} runs" if len(runs) > 1 else runs[0].label
    title = f"specdec bench report: {about}"
    header = element(
        "header",
        element("h1", "specdec bench report"),
        element("button", "Dark theme", type="button", id="theme", hidden="hidden"),
        element("nav", element("ul", *entries), aria_label="Sections"),
    )
    footer = element(
        "footer", element("p", "Written by python run.py report from records of python run.py bench --json.")
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_GENERATOR}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{only}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{element('title', title)}\n<style>{style}</style>\n<script>{script}</script>\n</head>\n<body>\n"
        f"{element('a', 'Skip to the figures', href='#main', class_='skip')}\n{header}\n"
        f"{element('main', *shown, id='main')}\n{footer}\n</body>\n</html>\n"
    )


def _own(name: str) -> Html:
    return Html(resources.files("eval.report").joinpath(name).read_text(encoding="utf-8"))


def report(files: Sequence[Path], out: Path | None) -> int:
    """Write the page of `files` to `out` (default: report.html here), and print its path and a line per run.

    Raises ValueError: a file is no record, or `out` is something that must not be replaced; the message says which.
    """
    path = DEFAULT if out is None else out
    if path != STDOUT and path.resolve() in {file.resolve() for file in files}:
        raise ValueError(f"--out {path} is one of the records; name another file")
    check_writable(path, "--out", _is_report, "report")
    runs = label_runs([(file, read(file)) for file in files])
    put_text(path, page(runs))
    print(printable(str(path)))
    for run in runs:
        print(printable(_in_a_line(run)))
    return 0


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return _GENERATOR.encode() in file.read(1000)


def _in_a_line(run: RecordedRun) -> str:
    record, same = run.record, run.record["identical"].value
    median, lowest = times(run.figure_of_best("speedup_median")), times(run.figure_of_best("speedup_lowest"))
    said = [
        f"{f'{run.letter} {run.label}'.strip()}: {run.name or 'nothing'} {times(run.figure_of_best('speedup'))}",
        f"median {median}, lowest {lowest}",
        "output identical" if same is True else "OUTPUT DIFFERS" if same is False else "output not compared",
    ]
    said += ["SYNTHETIC acceptance"] if run.synthetic else []
    said += ["interrupted"] if record["interrupted"].value is True else []
    said += ["timings unreliable"] if run.unreliable else []
    return ", ".join(said)
