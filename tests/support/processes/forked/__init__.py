"""Commands in forks of a process that has imported what they need: a test of a command then costs no start of Python.

`[*python(), "run.py", ...]` in place of `[sys.executable, "run.py", ...]`, also with `-m MODULE` and `-c CODE`, for
`subprocess` and `PseudoTerminal`. Each fork has the folder, the environment, the streams, the signals and the exit
status that a process of its own would have; its streams are UTF-8.

What is read while Python, torch or transformers start is that of `server.py`: a command whose environment differs in
one of `AT_START` is refused. Tests of a start, of imports, or of such variables take `sys.executable`.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[3]


def python() -> list[str]:
    """Return what stands for `sys.executable` in a command that may run in a fork."""
    return [sys.executable, "-I", "-S", str(_HERE / "client.py"), _server(os.getpid())]


@cache
def _server(_: int) -> str:
    """Start the server of this process and return its address."""
    folder = tempfile.TemporaryDirectory(prefix="forks")
    address = os.path.join(folder.name, "address")
    words = [sys.executable, "-m", "tests.support.processes.forked.server", address]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    pipe = subprocess.PIPE
    server = subprocess.Popen(words, cwd=_ROOT, env=environment, stdin=pipe, stdout=pipe, start_new_session=True)
    assert server.stdin is not None and server.stdout is not None

    def stop() -> None:
        server.communicate()  # which closes its stdin
        folder.cleanup()

    atexit.register(stop)
    assert server.stdout.readline() == b"ready\n", "the server of forks did not start"
    return address
