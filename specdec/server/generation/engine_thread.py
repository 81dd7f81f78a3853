"""The engine's thread: it steps while anything is in flight, and tells each text's listener what a pass gave.

`submit` and `cancel` come from any thread, the web server's event loop above all, and never wait for a pass. Texts wait
in a bounded queue until there is room: at most `engine.max_batch` at a time, and no more than their caches' memory
allows. An error of one text ends that text; an error of a pass ends those in flight; neither ends the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import count

from specdec.cache import MAX_ROWS
from specdec.cache.conversation import needed_positions
from specdec.engine.engine import Engine
from specdec.engine.event import Event
from specdec.engine.sequence import Request, Sequence
from specdec.server.errors import ApiError

_log = logging.getLogger(__name__)

Listener = Callable[["Event | ApiError | Exception"], None]
"""Called in the engine's thread: with every event of a text, or with the error that ended it."""


class Ticket:
    """Hold a text that was submitted.

    `sequence` is None while the text waits for its first room, and when it is over: an answer that somebody still holds
    must not hold a cache. `number`: tickets are numbered as they come. `block`: soft tokens of its largest picture.
    """

    def __init__(self, request: Request, listener: Listener, number: int = 0) -> None:
        self.request, self.listener, self.number = request, listener, number
        self.sequence: Sequence | None = None
        self.block = max((block.end - block.start for block in request.media if block.whole), default=0)
        self.positions = 0  # that are reserved for it
        self.began = 0.0  # when the engine got it, on the clock of `time.perf_counter`
        self.over = False
        self._cached = 0

    @property
    def cached(self) -> int:
        """Return how many of the prompt's tokens came from the cache."""
        sequence = self.sequence
        return self._cached if sequence is None else sequence.reused

    def reserve(self) -> None:
        """Take note of the positions that the text needs now, and soon."""
        length = len(self.request.row) if self.sequence is None else self.sequence.length
        self.positions = needed_positions(length, self.request.limit)

    def end(self) -> None:
        """Let go of the sequence."""
        self.over, self._cached, self.sequence = True, self.cached, None


class EngineThread:
    """Run `engine` in a thread of its own.

    `max_waiting`: texts that may wait for room; the next one is refused. `cache_room`: bytes that the caches of texts
    in flight may take together (None: as many as come), and `bytes_for`: those of a cache of so many positions, and of
    a pass over a picture of so many soft tokens. A text gets room as it grows; where there is none left, the newest
    text waits until there is.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int = 32,
        cache_room: int | None = None,
        bytes_for: Callable[[int, int], int] = lambda positions, block: 0,
    ) -> None:
        self.engine, self.max_waiting, self.cache_room = engine, max_waiting, cache_room
        self._bytes_for, self._numbers = lru_cache(maxsize=256)(bytes_for), count()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[Sequence, Ticket] = {}
        self._lock = threading.RLock()  # guards these two; never held during a pass
        self.closing: ApiError | None = None  # why no text is taken any more
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="specdec engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Return how many texts the engine has."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Return how many texts wait for room."""
        return len(self._waiting)

    def texts(self) -> list[dict[str, float]]:
        """Return the texts that the engine has: prompt tokens, those from the cache, emitted ones, and seconds."""
        with self._lock:
            running, now = list(self._running.items()), time.perf_counter()
        return [
            {
                "prompt": sequence.prompt_tokens,
                "cached": sequence.reused,
                "emitted": sequence.length - sequence.prompt_tokens,
                "seconds": now - ticket.began,
            }
            for sequence, ticket in running
        ]

    def submit(self, requests: list[tuple[Request, Listener]]) -> list[Ticket]:
        """Queue requests, each with its listener; return their tickets.

        All of them are taken or none. Raises ApiError when the queue is full, or the thread is being closed.
        """
        with self._lock:
            if self.closing is not None:
                raise self.closing
            free = self.engine.max_batch - len(self._running) + self.max_waiting - len(self._waiting)
            if len(requests) > free:
                raise ApiError(
                    429,
                    f"no room: {len(self._running)} under way and {len(self._waiting)} waiting; try again later",
                    code="queue_full",
                )
            tickets = [Ticket(*one, next(self._numbers)) for one in requests]
            self._waiting.extend(tickets)
            self._admit()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """End a text before the next pass; its listener hears no more. Nothing happens when it has ended."""
        with self._lock:
            if ticket.over:
                return
            with suppress(ValueError):
                self._waiting.remove(ticket)
            if ticket.sequence is not None:
                self._running.pop(ticket.sequence, None)
                self.engine.cancel(ticket.sequence)
            ticket.end()
            self._admit()

    @property
    def places(self) -> int:
        """Return how many texts there can be at once, decoded or waiting."""
        return self.engine.max_batch + self.max_waiting

    def fail_all(self, error: ApiError, waiting: bool = True) -> None:
        """End every text with `error`; those that wait only where `waiting`."""
        with self._lock:
            tickets = [*self._running.values(), *(self._waiting if waiting else ())]
            for ticket in tickets:
                self.cancel(ticket)
        for ticket in tickets:
            self._tell(ticket, error)

    def refuse(self) -> None:
        """End every text, and take no other one."""
        self.closing = ApiError(503, "the server is shutting down", code="shutting_down")
        self.fail_all(self.closing)

    def close(self, seconds: float = 10) -> None:
        """End every text and the thread; wait for the pass that is under way."""
        self.refuse()
        self._ended.wait(seconds)

    def _admit(self) -> None:
        """Hand texts that wait to the engine, the oldest first, as far as there is room. The lock is held."""
        while self._waiting and len(self._running) < self.engine.max_batch:
            ticket = self._waiting[0]
            ticket.reserve()
            if self._running and not self._fit([*self._running.values(), ticket]):
                return
            self._waiting.popleft()
            if ticket.sequence is None:
                ticket.began = time.perf_counter()
                ticket.sequence = self.engine.add(ticket.request)
            else:
                self.engine.resume(ticket.sequence)
            self._running[ticket.sequence] = ticket

    def _fit(self, tickets: Iterable[Ticket]) -> bool:
        """Return whether the caches of `tickets` have room together."""
        return (
            self.cache_room is None
            or sum(self._bytes_for(one.positions, one.block) for one in tickets) <= self.cache_room
        )

    def _make_room(self) -> None:
        """Give room to texts that have grown; where there is none, the newest text makes room and waits."""
        if self.cache_room is None:
            return
        with self._lock:
            for sequence, ticket in self._running.items():
                if sequence.length + MAX_ROWS > ticket.positions:
                    ticket.reserve()
            while len(self._running) > 1 and not self._fit(self._running.values()):
                sequence, newest = max(self._running.items(), key=lambda one: one[1].number)
                self.engine.pause(sequence)
                del self._running[sequence]
                self._waiting.appendleft(newest)

    def _run(self) -> None:
        try:
            while self.closing is None or self.engine.in_flight:
                if self.engine.wait(0.2):
                    self._make_room()
                    self._step()
        finally:
            self.engine.close()  # what was cancelled during the last pass gives its cache back
            self._ended.set()

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:  # out of memory, a drafter's own error: these texts end, the next ones may go well
            _log.exception("a pass failed")
            failed = ApiError(500, f"a pass failed: {error or type(error).__name__}", code="pass_failed")
            self.fail_all(failed, waiting=False)
            return
        self.engine.stats.timeline.clear()  # of one generation; here it would grow for ever
        for event in events:
            with self._lock:
                ticket = self._running.get(event.sequence)
                if event.sequence.ended:
                    self._running.pop(event.sequence, None)
                    if ticket is not None:
                        ticket.end()
                    self._admit()
            if ticket is not None:
                self._tell(ticket, event if event.sequence.error is None else event.sequence.error)

    def _tell(self, ticket: Ticket, what: Event | ApiError | Exception) -> None:
        try:
            ticket.listener(what)
        except Exception:  # its event loop has ended, say
            _log.debug("a listener failed", exc_info=True)
            self.cancel(ticket)
