"""Import what commands need, and fork for each one: see the package. It ends when its stdin does.

No OpenMP region and no kernel runs before a fork, for their threads would be missing in it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
from importlib import import_module
from typing import Any

AT_START = ("PYTHON", "OMP_", "MKL_", "HF_", "TRANSFORMERS_", "SPECDEC_KERNELS", "SPECDEC_REQUIRE_NATIVE")
_LATER = ("PYTHONUNBUFFERED", "PYTHONWARNINGS")  # of those, what a fork can still do
_STREAMS = 3


def preload() -> None:
    """Import all modules of the project, and what they import at their first use on a tiny model."""
    for package in ("specdec", "drafter", "eval"):
        for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
            if not module.name.rpartition(".")[2].startswith("_"):  # neither __main__ nor the native library
                import_module(module.name)
    for name in ("run", "tests.support.tiny_run", "tests.support.tiny_folder"):
        import_module(name)


def serve(address: str) -> dict[str, Any]:
    """Fork for each request at `address`; return one in its fork. Exits when stdin ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if server not in ready:
                os._exit(0)
            connection, _ = server.accept()
            if os.fork() == 0:
                break
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # watchers that have ended
                    pass
    head, streams, _, _ = socket.recv_fds(connection, 4, _STREAMS)
    size, data = int.from_bytes(head, "big"), b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    child = os.fork()
    if child:
        _watch(child, connection, streams)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return json.loads(data)


def _watch(child: int, connection: socket.socket, streams: list[int]) -> None:
    """Wait for `child` and tell its status; meanwhile pass on signals, and kill `child` when the other side is gone."""
    for stream in (*range(_STREAMS), *streams):
        os.close(stream)

    def pass_on() -> None:
        while data := connection.recv(1):
            os.kill(child, data[0])
        os.kill(child, signal.SIGKILL)

    threading.Thread(target=pass_on, daemon=True).start()
    _, status = os.waitpid(child, 0)
    try:
        connection.sendall(status.to_bytes(4, "big"))
    finally:
        os._exit(0)


def become(words: list[str], folder: str, environment: dict[str, str], deaf: bool) -> None:
    """Run `words` as Python would that starts with them."""
    names = {*environment, *os.environ}
    at_start = (name for name in names if name.startswith(AT_START) and name not in _LATER)
    other = sorted(name for name in at_start if environment.get(name) != os.environ.get(name))
    assert not other, f"take sys.executable: {other} are read when a process starts"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.default_int_handler)
    _open_streams(bool(environment.get("PYTHONUNBUFFERED")))
    kind, *rest = words
    if kind == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        name, *rest = rest
        sys.argv, sys.path[0] = [name, *rest], folder
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [kind, *rest], os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


def _open_streams(unbuffered: bool) -> None:
    for number, (name, mode, errors) in enumerate(
        (("stdin", "rb", "strict"), ("stdout", "wb", "strict"), ("stderr", "wb", "backslashreplace"))
    ):
        through = unbuffered and mode == "wb"
        stream = io.TextIOWrapper(
            open(number, mode, 0 if through else -1, closefd=False),  # noqa: SIM115
            encoding="utf-8",
            errors=errors,
            line_buffering=name == "stderr" or os.isatty(number),
            write_through=through,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _end(code: int) -> None:
    """End as Python does, but for taking its modules apart, which would copy every page that a fork shares."""
    with contextlib.suppress(OSError):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    gc.unfreeze()
    sys.exit(code)  # a stream that takes nothing more: what Python says then is of interest


if __name__ == "__main__":
    preload()
    gc.collect()
    gc.freeze()  # or the collector would write to every page that a fork shares
    try:
        become(**serve(sys.argv[1]))
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            gc.unfreeze()
            raise
        _end(stopped.code or 0)
    except BaseException:
        gc.unfreeze()
        raise
    _end(0)
