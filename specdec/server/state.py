"""What a running server knows: its model once that is loaded, whether it still takes requests, what it has done."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from specdec.engine.telemetry import PREFIX, prometheus
from specdec.server.errors import ApiError
from specdec.server.generation.answer import Answer
from specdec.server.generation.service import Service
from specdec.server.http import KEEP_ALIVE

NEWEST = 1024  # latencies that percentiles are taken of
QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Latencies:
    """Hold the newest seconds to first tokens and between tokens."""

    first: deque[float] = field(default_factory=lambda: deque(maxlen=NEWEST))
    between: deque[float] = field(default_factory=lambda: deque(maxlen=NEWEST))

    def take(self, answer: Answer) -> None:
        """Take the latencies of an answer that has ended."""
        for output in answer.outputs:
            if times := list(output.times):
                self.first.append(times[0] - answer.asked)
                self.between.extend(b - a for a, b in pairwise(times))


def quantiles(values: Iterable[float]) -> dict[float, float]:
    """Return the quantiles of `values`; nothing where there are none."""
    ordered = sorted(values)
    return {q: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES} if ordered else {}


class ServerState:
    """Hold the state that endpoints share. `service` is None while the model is being loaded."""

    def __init__(self, service: Service | None = None, debug: bool = False, keep_alive: float = KEEP_ALIVE) -> None:
        """Begin with `service`, if it is there already. `debug`: show clients' texts to those who ask for them;
        `keep_alive`: seconds of silence after which a stream gets a comment."""
        self.service, self.debug, self.keep_alive = service, debug, keep_alive
        self.draining = False
        self.began = time.time()
        self.replies: Counter[tuple[str, int]] = Counter()  # by path and status
        self.latencies = Latencies()

    def ready(self) -> Service:
        """Return the service. Raises ApiError while there is none."""
        if self.service is None:
            raise ApiError(503, "the model is being loaded", code="loading")
        return self.service

    def open(self) -> Service:
        """Return the service, for a new answer. Raises ApiError as `ready` does, and when the server is to end."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return self.ready()

    def ended(self, answer: Answer) -> None:
        """Cancel what is left of `answer`, and count it."""
        answer.cancel()
        self.latencies.take(answer)

    def metrics(self) -> str:
        """Return counters and gauges in Prometheus' text format."""
        service = self.ready()
        lines = [
            *_family("requests_total", "counter", "Replies.", _labelled(self.replies)),
            *_family("num_requests_running", "gauge", "Texts that are decoded.", [("", service.thread.running)]),
            *_family("num_requests_waiting", "gauge", "Texts that wait for room.", [("", service.thread.waiting)]),
            *_family(
                "conversations_bytes",
                "gauge",
                "Bytes of kept conversations.",
                [("", service.model.conversations.nbytes)],
            ),
            *_summary(
                "time_to_first_token_seconds",
                "From queueing a request, its prompt made, to its first token.",
                self.latencies.first,
            ),
            *_summary("inter_token_latency_seconds", "Between passes that emit tokens.", self.latencies.between),
        ]
        return prometheus(service.engine.stats, service.name) + "\n".join(lines) + "\n"


def _labelled(replies: Counter[tuple[str, int]]) -> list[tuple[str, float]]:
    return [(f'{{path="{path}",status="{status}"}}', count) for (path, status), count in sorted(replies.items())]


def _summary(name: str, about: str, values: deque[float]) -> list[str]:
    found = [(f'{{quantile="{q}"}}', value) for q, value in quantiles(list(values)).items()]
    return _family(name, "summary", about, found)


def _family(name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    head = [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} {kind}"]
    return head + [f"{PREFIX}{name}{labels} {value}" for labels, value in samples]
