"""Damaged bodies: each gets an answer or a refusal, in time, and good requests are answered all the while."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from eval.serve.fuzz.damage import Sent, damaged
from eval.serve.fuzz.good import GOOD
from eval.serve.fuzz.target import Target, complaint, resident, within

SECONDS = 60.0  # that an answer may take
_AT_ONCE = 4
_EVERY = 1000  # cases after which good requests are asked
_STUCK = 1800  # seconds without the end of any case: then every thread's stack is printed, and the process ends


@dataclass
class BodiesResult:
    """Hold what became of damaged bodies. `resident`: bytes in memory by cases that were done."""

    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    resident: dict[int, int] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0
    left: dict[str, int] = field(default_factory=dict)
    sockets: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in JSON types."""
        return {
            "cases": sum(self.statuses.values()),
            "by_socket": self.sockets,
            "statuses": dict(sorted(self.statuses.items())),
            "failed": len(self.failures),
            "failures": self.failures[:100],
            "seconds": self.seconds,
            "slowest_seconds": self.slowest[0],
            "slowest_case": self.slowest[1],
            "resident_bytes": self.resident,
            "left": self.left,
        }


async def run_bodies(
    on: Target, cases: int, seed: int, sockets: float, advance: Callable[[], None], first: int = 0
) -> BodiesResult:
    """Send `cases` damaged bodies, from number `first` of a seed on, a share `sockets` of them over connections."""
    result, began = BodiesResult(), time.perf_counter()
    numbers = iter(range(first, first + cases))
    marks = {first + max(1, cases // 50)} | {first + cases * i // 10 for i in range(1, 10)}

    async def worker() -> None:
        for number in numbers:
            await _one(on, seed, number, sockets, result)
            faulthandler.dump_traceback_later(_STUCK, exit=True)
            advance()
            done = sum(result.statuses.values())
            if first + done in marks:
                result.resident[done] = resident()
            if done % _EVERY == 0:
                await check_good(on, result.failures)

    faulthandler.dump_traceback_later(_STUCK, exit=True)
    try:
        await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
        await check_good(on, result.failures)
    finally:
        faulthandler.cancel_dump_traceback_later()
        result.left = on.left()
        result.resident[sum(result.statuses.values())] = resident()
        result.seconds = time.perf_counter() - began
    return result


async def _one(on: Target, seed: int, number: int, sockets: float, result: BodiesResult) -> None:
    sent, by_socket = damaged(seed, number), Random(number).random() < sockets
    result.sockets += by_socket
    began = time.perf_counter()
    try:
        reply = await within(SECONDS, (on.ask_by_socket if by_socket else on.ask)(sent))
        wrong, status = complaint(reply), str(reply.status)
    except asyncio.TimeoutError:
        wrong, status = f"no end after {SECONDS:.0f} seconds", "none"
    except Exception as error:
        wrong, status = f"{type(error).__name__}: {error}", "none"
    if by_socket and wrong is not None and "without JSON" in wrong:
        wrong = None  # chunked, or refused before the application: the status says enough
    result.statuses[status] += 1
    result.slowest = max(result.slowest, (time.perf_counter() - began, number))
    if wrong is not None:
        body = sent.body[:2000].decode("utf-8", "replace")
        log = on.errors.newest[-1500:]
        result.failures.append({"case": number, "path": sent.path, "why": wrong, "log": log, "body": body})


async def check_good(on: Target, failures: list[dict[str, Any]]) -> None:
    """Ask every good request; those that are not answered as they must be are added to `failures`."""
    for good in GOOD:
        reply = await within(SECONDS, on.ask(Sent(good.path, json.dumps(good.body).encode())))
        if complaint(reply) or reply.status != (400 if good.refused else 200):
            why = f"a good request got {reply.status}: {reply.body[:300]!r}"
            failures.append({"case": "good", "path": good.path, "why": why, "log": on.errors.newest[-1500:]})
