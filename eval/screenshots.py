"""Pictures for the documentation: a report as a headless Chromium draws it, and tables as a terminal shows them.

`python -m eval.screenshots --report report.html --bench run.json --dashboard` writes to docs/images: report.png, 1,200
px wide, and report-narrow.png, 400 px wide; bench.svg, the tables of a bench's record; dashboard.svg, the live
dashboard. For the dashboard the default model answers the bench's own prompts, here and now.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from rich.console import Console

from eval.cli.options import GenerationSettings, module_parser, whole_number
from eval.cli.output import file_name, run_guarded
from specdec.util.atomic import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PICTURES = {"report.png": 1200, "report-narrow.png": 400}
_TALLEST = 16_000  # px that Chromium draws in one picture
_SECONDS = 120


def find_browser() -> str:
    """Return the path of a browser. Raises ValueError when there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise ValueError(f"no browser to draw with ({', '.join(BROWSERS)}): apt install chromium")


def browse(browser: str, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Open `address` headless with a profile of its own; raise ValueError when the browser fails."""
    # Chromium's sandbox refuses to run as root, as in a container; the page is a file of ours and has no network.
    as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        fixed = ["--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", f"--user-data-dir={profile}"]
        command = [browser, *fixed, *as_root, *options, address]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{browser} did not finish in {_SECONDS} s; try again on a machine with less to do"
            ) from None
    if done.returncode != 0:
        raise ValueError(f"{browser} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return done


_FRAME = """<iframe src="{}" width="{}" height="100"></iframe><script>
document.querySelector("iframe").addEventListener("load", (event) => {{
  const root = event.target.contentDocument.documentElement;
  if (root.dataset.script === "ran") document.title = "px" + root.scrollHeight;
}});
</script>"""


def height_of(browser: str, address: str, width: int) -> int:
    """Return the height of a report `width` px wide, in px.

    The report is measured within a frame: a headless window is 500 px wide at least.
    """
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(_FRAME.format(escape(address), width), encoding="utf-8")
        told = browse(browser, frame.as_uri(), "--allow-file-access-from-files", "--dump-dom").stdout
    if not (found := re.search(r"<title>px(\d+)</title>", told)):
        raise ValueError(f"{address}: not a page of run.py report, or its script did not run")
    return int(found[1])


def shoot(
    browser: str, report: Path, picture: Path, width: int, theme: str = "light", height: int | None = None
) -> None:
    """Write `picture` of a whole report, or of its first `height` px.

    Raises ValueError: `report` is not a page of `run.py report`, or the browser failed.
    """
    address = f"{report.resolve().as_uri()}#{theme}"
    height = height or min(height_of(browser, address, width), _TALLEST)
    with replacing(picture.absolute()) as temporary:
        named = temporary.with_name(f"{temporary.name}.png")  # by its ending Chromium knows what to write
        try:
            browse(browser, address, f"--window-size={width},{height}", f"--screenshot={named}")
            if not named.is_file():
                raise ValueError(f"{browser} wrote no picture of {report}")
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)


def terminal(draw: Callable[[Console], object], title: str, picture: Path) -> None:
    """Write the output of `draw` on a terminal of 80 columns as an SVG, in a window called `title`."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, highlight=False)
    draw(console)
    drawn = console.export_svg(title=title, unique_id=picture.stem)
    # rich's fonts come from a server; without them the reader's own monospaced font is used.
    drawn = re.sub(r"@font-face\s*\{.*?\}\s*", "", drawn, flags=re.DOTALL)
    with replacing(picture.absolute()) as temporary:
        temporary.write_text(drawn, encoding="utf-8")


def draw_bench(record: Path, picture: Path) -> None:
    """Draw the tables of a bench's record. Raises ValueError when `record` is no such file."""
    from eval.bench.tables import show

    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        name = f"{found['model']['name']}, drafter {found['model']['drafter']}"
        terminal(lambda console: show(console, name, found), "python run.py bench", picture)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record}: not a record of run.py bench --json ({error})") from error


def draw_dashboard(picture: Path) -> None:
    """Draw the dashboard after the default model has answered the bench's own prompts."""
    from eval.cli.session import open_session
    from eval.live.dashboard import Dashboard
    from eval.prompts.sets import default_prompts

    session = open_session(GenerationSettings())
    dashboard = Dashboard(session.costs, session.memory)
    for prompt in default_prompts():
        ids = session.encode(prompt.opening())
        session.run(ids, on_round=dashboard.on_round)
    terminal(lambda console: console.print(dashboard), "python run.py chat --dashboard", picture)


def _parser() -> argparse.ArgumentParser:
    root = module_parser("screenshots", __doc__)
    root.add_argument("--report", type=file_name, metavar="FILE", help="a page that run.py report wrote")
    root.add_argument("--bench", type=file_name, metavar="FILE", help="what run.py bench --json wrote")
    root.add_argument("--dashboard", action="store_true", help="answer prompts and draw what chat --dashboard shows")
    root.add_argument(
        "--out", type=file_name, default=Path("docs/images"), metavar="FOLDER", help="default docs/images"
    )
    root.add_argument("--theme", choices=("light", "dark"), default="light", help="of the report; default light")
    root.add_argument("--height", type=whole_number(100), metavar="PX", help="only the first PX of the report")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures that the words `argv` (None: the process's own) ask for; return exit code 0.

    Raises ValueError: nothing is asked for, a file is not what it should be, or there is no browser.
    """
    a = _parser().parse_args(argv)
    if not (a.report or a.bench or a.dashboard):
        raise ValueError("nothing to draw: name a --report, a --bench record, or --dashboard")
    if a.report:
        if not a.report.is_file():
            raise ValueError(
                f"{a.report}: there is no such file; write it with run.py report RUN.json --out {a.report}"
            )
        browser = find_browser()
        for name, width in PICTURES.items():
            shoot(browser, a.report, a.out / name, width, a.theme, a.height)
            print(a.out / name)
    if a.bench:
        draw_bench(a.bench, a.out / "bench.svg")
        print(a.out / "bench.svg")
    if a.dashboard:
        draw_dashboard(a.out / "dashboard.svg")
        print(a.out / "dashboard.svg")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(main))
