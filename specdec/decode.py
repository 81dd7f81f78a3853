"""The loop. Plain decoding is this loop with empty drafts; there is no other path.

`pending` is the newest emitted token: it is not in the cache yet, so `cache.length == tokens - 1` between rounds.
Hidden row i of a pass is the state that chose token i, which is the pair that an MTP head consumes. The first pass is
the prompt's last chunk, whose last row chooses the first token: a round with nothing drafted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.control import DraftLength
from specdec.drafting import Draft, Drafter
from specdec.model.decoder import Decoder
from specdec.sampling import Sampler
from specdec.stats import GenerationStats
from specdec.verify import Choice, Verdict, cut, verify


@dataclass(frozen=True)
class Request:
    """One row to decode.

    `row` [n] int64: `padding` padding tokens, then the prompt; processors and `stop` see all of it, the model only the
    prompt. `limit`: tokens at which the row is full, padding included. `stop(tokens, choice)` is asked after every
    emitted token, in order; `emit(verdict, logits)` hears what a round emitted and the logits [emitted, vocab] that it
    was chosen from.
    """

    row: Tensor
    limit: int
    sampler: Sampler
    stop: Callable[[Tensor, Choice], bool]
    emit: Callable[[Verdict, Tensor], None]
    padding: int = 0


def decode(
    backbone: Decoder, drafter: Drafter, lengths: DraftLength, request: Request, stats: GenerationStats
) -> Tensor:
    """Decode `request`; returns its row with what was emitted. `stats` is true after every round."""
    clock = _Clock(stats)
    cache = backbone.new_cache()
    drafter.start(cache)
    n, room = len(request.row), cache.max_rows - 1
    text = request.row.new_empty(request.limit + cache.max_rows)  # [:n] is emitted; the draft in hand comes after it
    text[:n] = request.row
    draft, draft_seconds = Draft(), 0.0
    rows = prefill(backbone, request.row[request.padding :].to(backbone.device), cache)  # [T], the prompt's last chunk
    first = True
    while True:
        k = len(draft.tokens)
        hidden = backbone.forward(rows, cache)[-k - 1 :]  # [k + 1, hidden]
        logits = backbone.logits(hidden).to(text.device)  # [k + 1, vocab]
        with one_torch_thread():
            verdict = verify(draft.tokens, logits, text[: n + k], request.sampler.choose)
            verify_seconds = clock.lap("prefill" if first else "verify")
            text[n + verdict.accepted] = verdict.tokens[-1]
            verdict, done = cut(verdict, text[: n + len(verdict.tokens)], request.stop)
        emitted = len(verdict.tokens)
        cache.commit(len(rows) - k - 1 + emitted)
        n += emitted
        if not first:
            stats.count_round(k, min(verdict.accepted, k), draft.source)
            lengths.observe(k, verdict.accepted, draft_seconds, verify_seconds)
        first = False
        clock.emitted(emitted, cache)
        request.emit(verdict, logits[:emitted])
        if done or n >= request.limit:
            return text[:n].clone()

        k = lengths.choose(min(request.limit - n - 1, room, drafter.max_draft))  # a draft never outruns the budget
        clock.lap("other")
        draft = drafter.propose(text[request.padding : n].tolist(), hidden[emitted - 1], k) if k else Draft()
        assert len(draft.tokens) <= k
        if draft.tokens:
            text[n : n + len(draft.tokens)] = text.new_tensor(draft.tokens)
        rows = text[n - 1 : n + len(draft.tokens)].to(backbone.device)  # [k + 1]: the pending token and the draft
        draft_seconds = clock.lap("draft")


def prefill(backbone: Decoder, prompt: Tensor, cache: KVCache) -> Tensor:
    """Commit all of prompt [n] but its last chunk, in passes of at most `cache.max_rows` rows; returns that chunk."""
    *chunks, last = torch.split(prompt, cache.max_rows)
    for chunk in chunks:
        backbone.forward(chunk, cache)
        cache.commit(len(chunk))
    return last


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Small torch ops on the caller's thread alone.

    A row of logits is work for a few microseconds; shared, it would cost more, and torch's other threads would go on
    polling for milliseconds on the cores that the next pass needs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Clock:
    """Assigns the time since the last lap to a phase."""

    def __init__(self, stats: GenerationStats) -> None:
        self.stats = stats
        self.began = self.last = time.perf_counter()

    def lap(self, phase: str) -> float:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.stats.seconds[phase] += seconds
        return seconds

    def emitted(self, tokens: int, cache: KVCache) -> None:
        self.stats.emitted += tokens
        self.stats.timeline.append((time.perf_counter() - self.began, self.stats.emitted))
        self.stats.cache_bytes = cache.nbytes
