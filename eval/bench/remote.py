"""An engine in a process of its own, which answers through a pipe.

Why: thread pools of two libraries in one process get in each other's way (their idle threads spin for a while after
each call), and a library that runs out of memory would take the others' figures with it. Between turns a child waits on
its pipe, and `cpu_seconds` lets the caller see that the child does nothing else. Children ignore Ctrl-C, which a
terminal sends to all processes: the parent ends them. Left out: stopping children between turns by signal, for if the
parent were killed they would stay for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from eval.bench.engines import Engine, EngineTiming

PATIENCE = 5.0  # seconds that a child has to end by itself


class Remote:
    """Run `make(*arguments)` as an engine called `name`, in a new process, whose id is `process`; both must be
    picklable.

    Raises ValueError, here and from `run`: the error that the engine raised, or that its process has ended.
    """

    def __init__(self, name: str, make: Callable[..., Engine], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads half-way
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._child.start()
        theirs.close()  # so that a child's end shows as the end of the pipe
        assert self._child.pid is not None
        self.process = self._child.pid
        try:
            self.details: str = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, ids: Sequence[int], tokens: int) -> EngineTiming:
        """Decode `tokens` tokens after `ids` in the engine's process, and return its timing."""
        timing = self._ask((list(ids), tokens))
        assert isinstance(timing, EngineTiming)
        return timing

    def cpu_seconds(self) -> float:
        """Return the CPU time that the engine's process has used so far."""
        return float(self._ask(None))

    def close(self) -> None:
        """End the process, and free its memory; the engine is not used again."""
        self._child.terminate()
        self._child.join(PATIENCE)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()
        self._pipe.close()

    def _ask(self, question: tuple[list[int], int] | None) -> Any:
        with suppress(OSError):  # the child has gone; _answer says how
            self._pipe.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, error = self._pipe.recv()
        except (EOFError, OSError):
            self._child.join(PATIENCE)
            code = self._child.exitcode
            raise ValueError(
                f"{self.name}: its process has ended (exit code {code}); -9 is what running out of memory looks like"
            ) from None
        if error is not None:
            raise ValueError(f"{self.name}: {error}")
        return answer


def _serve(pipe: Connection, make: Callable[..., Engine], arguments: tuple[Any, ...]) -> None:
    """Serve as the child: answer (result, None), or (None, the error) before the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an end with clean-up: libraries hold semaphores
    os.environ["TQDM_DISABLE"] = "1"  # bars of a child would be drawn over the parent's
    try:
        engine = make(*arguments)
        pipe.send((engine.details, None))
        while True:
            question = pipe.recv()
            pipe.send((time.process_time() if question is None else engine.run(*question), None))
    except (EOFError, BrokenPipeError):  # the parent has gone
        return
    except Exception as error:  # any error of a library: the parent reports it in one line
        first = (str(error).strip() or "no reason given").splitlines()[0]
        pipe.send((None, f"{type(error).__name__}: {first}" if not isinstance(error, ValueError) else first))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # on its way out already: no traceback from the clean-up
