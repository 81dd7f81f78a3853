"""Pictures for the documentation: pages as a headless Chromium draws them, and tables as a terminal shows them.

`python -m eval.screenshots --report report.html --bench run.json --dashboard --server` writes to docs/images:
report.png, 1,200 px wide, and report-narrow.png, 400 px wide; bench.svg, the tables of a bench's record; dashboard.svg,
the live dashboard; server.png, the page of `run.py serve` while three clients ask at once. For the last two the default
model answers prompts of the bench, here and now.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path

from rich.console import Console

from eval.browser import browse, find_browser, opened
from eval.cli.options import GenerationSettings, module_parser, whole_number
from eval.cli.output import file_name, run_guarded
from specdec.util.atomic import replacing

_WIDE = 1200  # px
PICTURES = {"report.png": _WIDE, "report-narrow.png": 400}
_TALLEST = 16_000  # px that Chromium draws in one picture
_CLIENTS, _LOAD_SECONDS, _ANSWER = 3, 45, 240  # clients at once, seconds until the picture, tokens an answer

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


@contextmanager
def _serving(*options: str) -> Iterator[str]:
    """Give the address of `run.py serve` in a process of its own, once its model is loaded."""
    command = [sys.executable, "-m", "specdec", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            told = []
            for line in process.stderr:
                told.append(line)
                if found := re.search(r"drawn at (http://[^/]+)/", line):
                    yield found[1]
                    return
            raise ValueError(f"run.py serve has ended: {''.join(told[-3:]).strip()}")
        finally:
            process.terminate()
            threading.Thread(target=process.stderr.read, daemon=True).start()


def _converse(address: str, turns: Sequence[str], over: threading.Event) -> None:
    """Ask for one answer after another in a conversation, and begin again, until it is over."""
    messages: list[dict[str, str]] = []
    while not over.is_set():
        messages = [] if len(messages) > 6 else messages
        messages.append({"role": "user", "content": turns[len(messages) // 2 % len(turns)]})
        body = json.dumps({"messages": messages, "max_tokens": _ANSWER, "temperature": 0}).encode()
        asked = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as reply:
            messages.append(json.load(reply)["choices"][0]["message"])


def draw_server(browser: str, picture: Path, theme: str, *options: str, seconds: float = _LOAD_SECONDS) -> None:
    """Draw the page of a server, started with `options`, after so many seconds in which clients ask at once.

    Raises ValueError: the server or the browser failed, or the page complained of something.
    """
    from eval.prompts.sets import suite_prompts

    prompts = [prompt.turns for prompt in suite_prompts() if len(prompt.turns) > 1][:_CLIENTS]
    with _serving(*options) as address, opened(browser) as new_page:
        page, over = new_page(), threading.Event()
        page.show(_WIDE, 900, theme)
        page.open(f"{address}/dashboard")
        clients = [threading.Thread(target=_converse, args=(address, turns, over)) for turns in prompts]
        for client in clients:
            client.start()
        try:
            page.wait("document.querySelectorAll('#latencies tr').length > 0")
            time.sleep(seconds)
            page.wait(f"document.querySelectorAll('#texts tr').length >= {_CLIENTS}")
            page.show(_WIDE, page.value("document.documentElement.scrollHeight"), theme)
            page.picture(picture)
            if page.complaints:
                raise ValueError(f"the page complains: {page.complaints}")
        finally:
            over.set()
            for client in clients:
                client.join()


def _parser() -> argparse.ArgumentParser:
    root = module_parser("screenshots", __doc__)
    root.add_argument("--report", type=file_name, metavar="FILE", help="a page that run.py report wrote")
    root.add_argument("--bench", type=file_name, metavar="FILE", help="what run.py bench --json wrote")
    root.add_argument("--dashboard", action="store_true", help="answer prompts and draw what chat --dashboard shows")
    root.add_argument("--server", action="store_true", help="ask a server and draw its page meanwhile")
    root.add_argument(
        "--out", type=file_name, default=Path("docs/images"), metavar="FOLDER", help="default docs/images"
    )
    root.add_argument("--theme", choices=("light", "dark"), default="light", help="of pages; default light")
    root.add_argument("--height", type=whole_number(100), metavar="PX", help="only the first PX of the report")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures that the words `argv` (None: the process's own) ask for; return exit code 0.

    Raises ValueError: nothing is asked for, a file is not what it should be, or there is no browser.
    """
    a = _parser().parse_args(argv)
    if not (a.report or a.bench or a.dashboard or a.server):
        raise ValueError("nothing to draw: name a --report, a --bench record, --dashboard or --server")
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
    if a.server:
        draw_server(find_browser(), a.out / "server.png", a.theme)
        print(a.out / "server.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(main))
