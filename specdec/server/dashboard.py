"""The page that shows what a server does, and the figures that it draws: live, over server-sent events.

The page is one file with its styles and its script in it. It asks nobody else for anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from specdec.engine.stats import GenerationStats
from specdec.memory.system import available_bytes, resident_bytes
from specdec.server.errors import ApiError
from specdec.server.generation.service import Service
from specdec.server.http import EventStream, event
from specdec.server.state import ServerState, quantiles

PERIOD = 1.0  # seconds between two events
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(state: ServerState, request: Request) -> Response:
    """Give the page, which holds nothing of anybody's."""
    return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})


@cache
def _page() -> str:
    folder = files("specdec.server") / "page"
    text = (folder / "dashboard.html").read_text(encoding="utf-8")
    for mark, name in (("/*style*/", "dashboard.css"), ("/*script*/", "dashboard.js")):
        text = text.replace(mark, (folder / name).read_text(encoding="utf-8"))
    return text


async def live(state: ServerState, request: Request) -> Response:
    """Give the figures, now and every second."""
    service = state.ready()
    return EventStream(_events(state, service), _failed, lambda: None)


async def _events(state: ServerState, service: Service) -> AsyncIterator[str]:
    before = _counts(service)
    yield event(figures(state, service) | {"tokens_per_second": 0.0})
    while not state.draining:
        await asyncio.sleep(PERIOD)
        now = _counts(service)
        seconds = now[1] - before[1]
        speed = (now[0] - before[0]) / seconds if seconds > 0 else 0.0
        before = now
        yield event(figures(state, service) | {"tokens_per_second": speed})


def _counts(service: Service) -> tuple[int, float]:
    return service.engine.stats.emitted, time.perf_counter()


def _failed(error: ApiError) -> str:
    return event(error.openai())


def figures(state: ServerState, service: Service) -> dict[str, Any]:
    """Return all figures as they are now, in JSON types."""
    stats, conversations = GenerationStats(), service.model.conversations
    stats.merge(service.engine.stats)
    costs = service.model.lengths.costs if service.model.lengths.measured_for is not None else None
    running = service.thread.running
    texts = max(1, running)
    return {
        "model": service.name,
        "drafter": service.model.drafter.name,
        "context": service.context,
        "seconds_up": time.time() - state.began,
        "running": running,
        "waiting": service.thread.waiting,
        "places": service.engine.max_batch,
        "plain_tokens_per_second": None if costs is None else texts / costs.of_pass(texts, texts),
        "prompts": stats.prompts,
        "emitted": stats.emitted,
        "rounds": stats.rounds,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "acceptance_rate": stats.acceptance_rate,
        # A round that is being counted may have made one of them longer already.
        "positions": [*zip(stats.drafted_per_position, stats.accepted_per_position, strict=False)],
        "sources": stats.draft_sources,
        "first": quantiles(list(state.latencies.first)),
        "between": quantiles(list(state.latencies.between)),
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.reused,
        "conversations": len(conversations.kept),
        "conversations_bytes": conversations.nbytes,
        "conversations_limit": conversations.limit,
        "resident_bytes": resident_bytes(),
        "available_bytes": available_bytes(),
        "texts": service.thread.texts(),
    }
