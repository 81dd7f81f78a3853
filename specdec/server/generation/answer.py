"""One request's answer: its choices' tokens, made into pieces in the engine's thread and awaited in the event loop.

Parsing and stop strings run inside the engine's stop condition, so that a text ends with the very token that completes
a stop string, and nothing after that token is computed or kept.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from specdec.engine.event import Event
from specdec.engine.grammar import GrammarError
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.server.errors import ApiError, of_exception
from specdec.server.formats.answer import joined
from specdec.server.formats.base import Delta, OutputParser
from specdec.server.generation.engine_thread import EngineThread, Ticket
from specdec.server.generation.mailbox import Mailbox
from specdec.server.generation.stop_strings import StopStrings


@dataclass(frozen=True)
class TokenLogprob:
    """Hold the log probability of an emitted token before any sampling setting, and of the likeliest tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """Hold what a pass gave for one choice. `finish`: how the choice ended ("stop", "length" or "tool_calls")."""

    index: int
    deltas: list[Delta] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    error: ApiError | None = None


def together(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield `pieces` with neighbours of one choice as one; an error stays apart."""
    last: Piece | None = None
    for one in pieces:
        if last is None:
            last = one
        elif last.index == one.index and one.error is None:
            deltas = list(joined((*last.deltas, *one.deltas)))
            last = Piece(one.index, deltas, last.logprobs + one.logprobs, one.finish)
        else:
            yield last
            last = one
    if last is not None:
        yield last


class Output:
    """Take the tokens of one choice, in the engine's thread. `stop` is the request's stop condition.

    `ends`: token ids that end the text; with `ignore_eos` they are passed over instead.
    """

    def __init__(
        self, index: int, parser: OutputParser, stops: StopStrings, ends: frozenset[int], ignore_eos: bool = False
    ) -> None:
        self.index, self.parser, self.stops, self.ends, self.ignore_eos = index, parser, stops, ends, ignore_eos
        self.tokens = 0
        self.stats = GenerationStats()
        self.times: list[float] = []  # of the passes that emitted tokens, on the clock of `time.perf_counter`
        self._logged: list[int] = []  # tokens since the last piece that are part of the answer
        self._deltas: list[Delta] = []

    def stop(self, tokens: Tensor, choice: Choice) -> bool:
        """Take the emitted token of `choice`; return whether the text ends with it."""
        self.tokens += 1
        if choice.token in self.ends:
            return not self.ignore_eos
        self._logged.append(choice.token)
        self._take(self.parser.feed([choice.token]))
        return self.stops.found is not None

    def piece(self, event: Event, logprobs: int | None) -> Piece:
        """Return what has come since the last piece, the end included where `event` is the last one."""
        if event.tokens:
            self.times.append(time.perf_counter())
        finish = event.sequence.finish
        if finish is not None and self.stops.found is None:
            self._take(self.parser.finish(finish == "length"))
            if rest := self.stops.finish():
                self._deltas.append(Delta(content=rest))
        deltas, self._deltas = self._deltas, []
        logged, self._logged = self._logged, []
        reported = [] if logprobs is None or not logged else list(_logprobs(logged, event, logprobs))
        called = finish == "stop" and self.stops.found is None and self.parser.calls > 0
        return Piece(self.index, deltas, reported, "tool_calls" if called else finish)

    def _take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if self.stops.found is not None:
                return
            if delta.content:
                if text := self.stops.feed(delta.content):
                    self._deltas.append(Delta(content=text))
            else:
                self._deltas.append(delta)


def _error(what: ApiError | Exception) -> ApiError:
    if isinstance(what, GrammarError):  # of the request's own schema
        return ApiError(400, str(what), code="grammar_too_complex")
    return of_exception(what)


def _logprobs(tokens: list[int], event: Event, count: int) -> Iterator[TokenLogprob]:
    assert event.logits is not None
    for token, row in zip(event.tokens, event.logits.float().log_softmax(-1), strict=True):
        if token in tokens:  # an end token is no part of the answer
            best = row.topk(count) if count else None
            top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            yield TokenLogprob(token, float(row[token]), top)


@dataclass
class Parting:
    """Say where a prompt of `tokens` tokens parted from the kept text that was most like it: after `shared` tokens.

    `before`: tokens before that place; `was`, `now`: those after it, of the kept text and of the prompt. `cached`: how
    many came from the cache (None: the answer is on its way).
    """

    tokens: int
    shared: int
    before: list[int]
    was: list[int]
    now: list[int]
    cached: int | None = None


@dataclass
class Usage:
    """Hold the counts of an answer.

    `cached` of the `prompt` tokens came from an earlier text's cache, and `reasoning` of the `completion` tokens are
    thoughts, with the marks around them.
    """

    prompt: int
    cached: int
    completion: int
    reasoning: int


class Answer:
    """Hold the choices of one request, on their way. Made, iterated and cancelled in the event loop."""

    def __init__(self, outputs: list[Output], prompt_tokens: int, logprobs: int | None) -> None:
        self.outputs, self.prompt_tokens, self.logprobs = outputs, prompt_tokens, logprobs
        self.tickets: list[Ticket] = []
        self.asked = time.perf_counter()
        self.parting: Parting | None = None
        self._thread: EngineThread | None = None
        self._mailbox: Mailbox[Piece] = Mailbox()

    def begin(self, thread: EngineThread, tickets: list[Ticket]) -> None:
        """Take note of where the texts are decoded."""
        self._thread, self.tickets = thread, tickets

    def on_event(self, output: Output, what: Event | ApiError | Exception) -> None:
        """Pass on what a pass gave for `output`: the listener, in the engine's thread."""
        if isinstance(what, Event):
            try:
                piece = output.piece(what, self.logprobs)
            except Exception as error:  # nothing else would tell the client, who waits
                piece = Piece(output.index, error=of_exception(error))
            if not (piece.deltas or piece.logprobs or piece.finish or piece.error):
                return
        else:
            piece = Piece(output.index, error=_error(what))
        self._mailbox.put(piece, urgent=piece.finish is not None or piece.error is not None)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of all choices as they come, until all have ended. Raises the ApiError that ended one."""
        going_on = len(self.outputs)
        while going_on:
            for piece in together(await self._mailbox.fetch()):
                if piece.error is not None:
                    self.cancel()
                    raise piece.error
                yield piece
                going_on -= piece.finish is not None

    def cancel(self) -> None:
        """End every choice before the next pass; nothing happens to those that have ended. Called for every answer."""
        if self._thread is not None:
            for ticket in self.tickets:
                self._thread.cancel(ticket)
        if self.parting is not None:
            self.parting.cached = self.usage.cached

    @property
    def stats(self) -> GenerationStats:
        """Return the counts of all choices together."""
        merged = GenerationStats()
        for output in self.outputs:
            merged.merge(output.stats)
        return merged

    @property
    def usage(self) -> Usage:
        """Return the counts so far."""
        cached = self.tickets[0].cached if self.tickets else 0
        completion = sum(output.tokens for output in self.outputs)
        return Usage(self.prompt_tokens, cached, completion, sum(output.parser.thoughts for output in self.outputs))

    def timings(self) -> dict[str, Any]:
        """Return counts and milliseconds of the first choice, under llama-server's names."""
        output, ticket = self.outputs[0], self.tickets[0]
        cached = ticket.cached
        first, last = (output.times[0], output.times[-1]) if output.times else (ticket.began, ticket.began)
        read, prompt_ms = self.prompt_tokens - cached, 1e3 * (first - ticket.began)
        decoded, decode_ms = output.tokens, 1e3 * (last - first)
        timings = {
            "cache_n": cached,
            "prompt_n": read,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / read if read else 0.0,
            "prompt_per_second": 1e3 * read / prompt_ms if prompt_ms > 0 else 0.0,
            "predicted_n": decoded,
            "predicted_ms": decode_ms,
            "predicted_per_token_ms": decode_ms / decoded if decoded else 0.0,
            "predicted_per_second": 1e3 * (decoded - 1) / decode_ms if decode_ms > 0 else 0.0,
        }
        if output.stats.drafted:
            timings |= {"draft_n": output.stats.drafted, "draft_n_accepted": output.stats.accepted}
        return timings


@dataclass
class Collected:
    """Hold the whole of one choice. `calls`: tool calls in the order of their indices."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def take(self, piece: Piece) -> None:
        """Add a piece."""
        for delta in piece.deltas:
            self.content += delta.content
            self.reasoning += delta.reasoning
            if (call := delta.tool_call) is not None:
                kept = self.calls.setdefault(call.index, {"id": "", "name": "", "arguments": ""})
                kept["id"], kept["name"] = call.id or kept["id"], call.name or kept["name"]
                kept["arguments"] += call.arguments
        self.logprobs += piece.logprobs
        self.finish = piece.finish or self.finish


async def collect(answer: Answer) -> list[Collected]:
    """Return the choices of `answer`, once all have ended. Raises the ApiError that ended one."""
    choices = [Collected() for _ in answer.outputs]
    async for piece in answer.pieces():
        choices[piece.index].take(piece)
    return choices
