"""Requests that schemathesis makes from the server's own OpenAPI page, over connections: valid ones and wrong ones.

Each reply has a status, a media type and a shape that the page tells, and none is an error of the server. Left out: the
check that every valid request is taken, for a schema cannot say that a conversation fits into the context, or that a
tool that is chosen exists.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from eval.serve.fuzz.damage import limited
from eval.serve.fuzz.target import Target

_ENDLESS = "/dashboard/events"
_CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
_MODES: tuple[Any, ...] = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
_SECONDS = 60


def run_schema(on: Target, examples: int, number: int) -> dict[str, Any]:
    """Send up to `examples` valid and as many wrong requests to each path; return the figures in JSON types."""
    host, port = on.address
    address = f"http://{host}:{port}"
    page = schemathesis.openapi.from_url(f"{address}/openapi.json").exclude(path=_ENDLESS)
    statuses, failures = Counter[str](), list[dict[str, Any]]()
    began = time.perf_counter()
    found: Any  # its types say that an operation may be broken, which none is
    for found in page.get_all_operations():
        operation = found.ok()
        for mode in _MODES if operation.body else _MODES[:1]:  # nothing can be wrong about a path alone
            ask = _asker(address, [*_CHECKS, *([negative_data_rejection] if mode.is_negative else [])], statuses)
            made: Any = settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            try:
                strategy: Any = given(operation.as_strategy(generation_mode=mode))
                with_seed(number)(made(strategy(ask)))()
            except (Exception, FailureGroup) as error:
                failures.append({"case": mode.value, "path": operation.label, "why": f"{error}"[:3000]})
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "failed": len(failures),
        "failures": failures,
        "seconds": time.perf_counter() - began,
        "left": on.left(),
    }


def _asker(address: str, checks: list[Any], statuses: Counter[str]) -> Callable[[Any], None]:
    """Return what sends a request and checks its reply."""

    def ask(case: Any) -> None:
        case.body = limited(case.body)
        reply = case.call(base_url=address, timeout=_SECONDS)
        statuses[str(reply.status_code)] += 1
        case.validate_response(reply, checks=checks)

    return ask
