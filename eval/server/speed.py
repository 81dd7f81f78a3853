"""What serving costs, and what predictions and schemas do to speed.

What: the same prompts through `generate()` and over HTTP, in turns; an edited file with a right prediction, a wrong one
and none, in turns; the same questions with a schema and without. Every text of a comparison has to be the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from eval.prompts.sets import Message
from eval.server.client import Streamed
from eval.server.served import Served
from eval.server.tasks import Task

LINES = 200  # of the file that is edited


@dataclass(frozen=True)
class OverHTTP:
    """Keep the figures of a prompt: seconds by `generate()` and over HTTP for so many tokens, and how long after the
    first token its bytes came."""

    tokens: int
    in_process: float
    http: float
    first_byte: float
    identical: bool


@dataclass(frozen=True)
class Predicted:
    """Keep the figures of an answer under a `prediction` ("none", "right", "edited", "wrong")."""

    prompt: str
    prediction: str
    tokens: int
    seconds: float
    accepted: int
    rejected: int
    identical: bool

    @property
    def speed(self) -> float:
        """Return tokens a second after the first token."""
        return (self.tokens - 1) / self.seconds


@dataclass(frozen=True)
class Constrained:
    """Keep tokens and seconds after the first token of an answer, with a schema and without."""

    task: str
    with_tokens: int
    with_seconds: float
    without_tokens: int
    without_seconds: float


def over_http(served: Served, prompts: Sequence[Sequence[Message]]) -> Iterator[OverHTTP]:
    """Decode each of `prompts` in process and over HTTP, one after the other, each way first every other time."""
    limit = served.session.settings.max_new_tokens
    for i, messages in enumerate(prompts):
        body = {"messages": list(messages), "temperature": 0, "max_tokens": limit}
        ids = served.session.encode(messages)
        if i == 0:
            served.stream(body)
            served.session.run(ids)
        served.forget()
        if i % 2:
            streamed, run = served.stream(body), served.session.run(ids)
        else:
            run, streamed = served.session.run(ids), served.stream(body)
        same = served.session.text(run.tokens) == streamed.text and len(run.tokens) == streamed.tokens
        yield OverHTTP(len(run.tokens), run.seconds, streamed.seconds, streamed.first - streamed.emitted, same)


def predictions(served: Served, tokens: int, repeat: int) -> Iterator[Predicted]:
    """Ask for an edited file of `LINES` lines, which stands in the prompt or is only described, with each prediction,
    `repeat` times in turns; answers have `tokens` tokens. The right prediction is the model's own answer without one;
    the edited one lacks every tenth line of it."""
    file = "\n".join(f"    {name}_{i} = get({i * 37 % 101})" for i, name in _names())
    described = f"Write a Python function that reads {LINES} settings, a line each, without a loop."
    given = f"Rename get to read in this function, and print all of it.\n\ndef settings(get):\n{file}\n"
    for name, question in (("file in the prompt", given), ("described", described)):
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        answer = served.stream(body).text
        lines = answer.splitlines(keepends=True)
        edited = "".join(line for i, line in enumerate(lines) if i % 10 != 5)
        expected = {"none": "", "right": answer, "edited": edited, "wrong": _backwards(file)}
        for _ in range(repeat):
            for kind, text in expected.items():
                found = served.stream({**body, "prediction": {"type": "content", "content": text}} if text else body)
                yield _predicted(name, kind, found, found.text == answer)


def _names() -> list[tuple[int, str]]:
    words = ("host", "port", "timeout", "retries", "user", "path", "level", "color", "limit", "cache")
    return [(i, words[i * 7 % len(words)]) for i in range(LINES)]


def _backwards(file: str) -> str:
    """Return the words of `file` backwards: a text of its length that is no answer."""
    return " ".join(reversed(file.split()))


def _predicted(prompt: str, kind: str, found: Streamed, same: bool) -> Predicted:
    details = found.usage["completion_tokens_details"]
    accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    return Predicted(prompt, kind, found.tokens, found.timings["predicted_ms"] / 1e3, accepted, rejected, same)


def constrained(served: Served, tasks: Sequence[Task]) -> Iterator[Constrained]:
    """Answer each of `tasks` with its schema or tools and without, one after the other."""
    for i, task in enumerate(tasks):
        body = {"messages": task.messages, "temperature": 0, "max_tokens": served.session.settings.max_new_tokens}
        if i == 0:
            served.stream({**body, **task.wanted})  # the first grammar of all takes a second
        pair = [{**body, **task.wanted}, body]
        found = [served.stream(one) for one in (pair if i % 2 else pair[::-1])]
        bound, free = found if i % 2 else found[::-1]
        times = [one.timings["predicted_ms"] / 1e3 for one in (bound, free)]
        yield Constrained(task.name, bound.tokens - 1, times[0], free.tokens - 1, times[1])


def http_record(found: Sequence[OverHTTP]) -> dict[str, Any]:
    """Return all figures and their summary, in JSON types."""
    tokens = sum(one.tokens for one in found)
    speeds = {"in_process": tokens / sum(one.in_process for one in found), "http": tokens / sum(o.http for o in found)}
    return {
        "prompts": [asdict(one) for one in found],
        "tokens_per_second": speeds,
        "ratio": speeds["http"] / speeds["in_process"],
        "median_ratio": median(one.in_process / one.http for one in found),
        "first_byte_ms": {
            "median": 1e3 * median(o.first_byte for o in found),
            "most": 1e3 * max(o.first_byte for o in found),
        },
        "identical": sum(one.identical for one in found),
    }


def prediction_record(found: Sequence[Predicted]) -> list[dict[str, Any]]:
    """Return the medians of each prompt and prediction, and their speed against no prediction, in JSON types."""
    groups: dict[tuple[str, str], list[Predicted]] = {}
    for one in found:
        groups.setdefault((one.prompt, one.prediction), []).append(one)
    records = []
    for (prompt, kind), group in groups.items():
        ratios = [one.speed / none.speed for one, none in zip(group, groups[prompt, "none"], strict=False)]
        records.append(
            {
                "prompt": prompt,
                "prediction": kind,
                "tokens": group[0].tokens,
                "tokens_per_second": median(one.speed for one in group),
                "ratio": median(ratios),
                "accepted": group[-1].accepted,
                "rejected": group[-1].rejected,
                "identical": all(one.identical for one in group),
            }
        )
    return records


def constrained_record(found: Sequence[Constrained]) -> dict[str, Any]:
    """Return all figures and the tokens a second with and without, in JSON types."""
    bound = sum(one.with_tokens for one in found) / sum(one.with_seconds for one in found)
    free = sum(one.without_tokens for one in found) / sum(one.without_seconds for one in found)
    return {"tasks": [asdict(one) for one in found], "with": bound, "without": free, "ratio": bound / free}
