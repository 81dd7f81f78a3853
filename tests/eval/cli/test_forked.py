"""A command in a fork is the command: words, folder, environment, streams, signals, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes.forked import python
from tests.support.tiny_folder import hears_ctrl_c

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forks")
SHOW = "import os, sys; print(sys.argv, os.getcwd(), os.environ.get('NEW'), os.environ.get('HOME'), sys.stdin.read())"


def deaf_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def both(*words: str, **more: object) -> subprocess.CompletedProcess[str]:
    """What `words` show in a fork, after checking that they show the same in a process of their own."""
    more.setdefault("env", {**os.environ, "PYTHONUNBUFFERED": ""})
    own, forked = (
        subprocess.run([*start, *words], capture_output=True, text=True, timeout=60, **more)  # type: ignore[call-overload]
        for start in ([sys.executable], python())
    )
    assert (own.returncode, own.stdout) == (forked.returncode, forked.stdout)
    assert own.stderr.splitlines()[-1:] == forked.stderr.splitlines()[-1:]  # not all of a traceback
    return forked


def test_what_a_command_sees_is_its_own(tmp_path: Path) -> None:
    environment = {**os.environ, "NEW": "é"}
    del environment["HOME"]
    shown = both("-c", SHOW, "a b", "\udcff", cwd=tmp_path, env=environment, input="typed é").stdout
    assert shown == f"['-c', 'a b', '\\udcff'] {tmp_path} é None typed é\n"
    (tmp_path / "here.py").write_text("import sys; print(__name__, sys.argv[1:], sys.path[0])")
    assert both("-m", "here", "x", cwd=tmp_path).stdout == f"__main__ ['x'] {tmp_path}\n"
    assert both("here.py", "x", cwd=tmp_path).stdout == f"__main__ ['x'] {tmp_path}\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('in words')", 1),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import atexit; atexit.register(print, 'last'); print('first')", 0),
        ("import os; os.close(1); print('nobody')", 120),
    ],
)
def test_how_a_command_ends(code: str, status: int) -> None:
    assert both("-c", code).returncode == status


def test_a_stream_without_a_buffer() -> None:
    code, environment = "import os; os.close(1); print('nobody')", {**os.environ, "PYTHONUNBUFFERED": "1"}
    assert both("-c", code, env=environment).returncode == 1


def test_signals_reach_the_fork_and_sigkill_too() -> None:
    code = "import signal, sys; print('ready', flush=True); signal.pause()"
    for number, status in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -9)):
        words, pipe = [*python(), "-c", code], subprocess.PIPE
        process = subprocess.Popen(words, stdout=pipe, stderr=pipe, preexec_fn=hears_ctrl_c)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)  # the end of the streams is that of the fork
        finally:
            process.kill()
        assert process.returncode == status
        assert (b"KeyboardInterrupt" in errors) == (number == signal.SIGINT)


def test_a_command_that_is_started_deaf_to_ctrl_c_stays_so() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    for deaf in (True, False):
        first = deaf_to_ctrl_c if deaf else hears_ctrl_c
        assert both("-c", code, preexec_fn=first).stdout == f"{deaf}\n"


def test_variables_that_are_read_at_the_start_are_refused() -> None:
    done = subprocess.run(
        [*python(), "-c", "pass"], env={**os.environ, "SPECDEC_KERNELS": "other"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "take sys.executable: ['SPECDEC_KERNELS']" in done.stderr
