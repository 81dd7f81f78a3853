"""Clients that leave at any moment: afterwards nothing of their requests is left."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from eval.serve.fuzz.damage import Sent
from eval.serve.fuzz.good import GOOD
from eval.serve.fuzz.target import Target, complaint, parsed, request_bytes, resident, within

_AT_ONCE = 3
_LONGEST = 40  # tokens
_SECONDS = 120.0
_LEAVING = 0.6  # of the clients


@dataclass
class LeavingResult:
    """Hold what clients that left have left behind. `resident` and `left`: by requests that were done."""

    ends: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    resident: dict[int, int] = field(default_factory=dict)
    left: dict[int, dict[str, int]] = field(default_factory=dict)
    kept_bytes: int = 0
    kept_limit: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in JSON types."""
        return {
            "requests": sum(self.ends.values()),
            "ends": dict(sorted(self.ends.items())),
            "failed": len(self.failures),
            "failures": self.failures[:100],
            "resident_bytes": self.resident,
            "left": self.left,
            "conversations_bytes": self.kept_bytes,
            "conversations_limit": self.kept_limit,
            "seconds": self.seconds,
        }


async def run_leaving(on: Target, requests: int, seed: int, advance: Callable[[], None]) -> LeavingResult:
    """Send `requests` good requests over connections, three at a time; most clients leave before the end."""
    result, began = LeavingResult(), time.perf_counter()
    numbers = list(range(requests))
    looks = sorted({min(requests, n) for n in (100, 500, 1000)} | {requests})
    before = on.left()
    for end in looks:
        coming = iter(numbers[sum(result.ends.values()) : end])

        async def worker(coming: Any = coming) -> None:
            for number in coming:
                await within(_SECONDS, _one(on, Random(f"{seed}-{number}"), result))
                advance()

        await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
        result.left[end] = on.left()
        result.resident[end] = resident()
        if more := {name: n for name, n in result.left[end].items() if n > before[name]}:
            result.failures.append({"case": end, "why": f"left behind after {end} requests: {more}"})
    kept = on.service.model.conversations
    result.kept_bytes, result.kept_limit = kept.nbytes, kept.limit or 0
    if result.kept_bytes > result.kept_limit:
        result.failures.append({"case": requests, "why": f"{kept.nbytes} bytes of conversations are kept"})
    result.seconds = time.perf_counter() - began
    return result


async def _one(on: Target, rng: Random, result: LeavingResult) -> None:
    good = rng.choice([one for one in GOOD if "count" not in one.path and "token" not in one.path])
    body = {**good.body, "max_completion_tokens": rng.randint(1, _LONGEST), "ignore_eos": True}
    if good.path == "/v1/chat/completions" and rng.random() < 0.2:
        body["n"] = 3
    sent = request_bytes(Sent(good.path, json.dumps(body).encode()))
    reader, writer = await asyncio.open_connection(*on.address)
    try:
        if rng.random() >= _LEAVING:
            writer.write(sent)
            reply = parsed(await reader.read())
            result.ends[f"answered {reply.status}"] += 1
            if (wrong := complaint(reply)) and "without JSON" not in wrong:
                result.failures.append({"case": sum(result.ends.values()), "path": good.path, "why": wrong})
            return
        cut = rng.random() < 0.1
        writer.write(sent[: rng.randrange(len(sent))] if cut else sent)
        await writer.drain()
        if cut:
            when = "left while it asked"
        elif rng.random() < 0.3:
            await reader.read(1)
            when = "left after the first byte"
        else:
            await asyncio.sleep(rng.choice((0, 0.002, 0.01, 0.05)))
            when = "left while it waited"
        result.ends[when] += 1
        if rng.random() < 0.3:  # without a goodbye
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        writer.close()
