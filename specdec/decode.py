"""The loop. Plain decoding is this loop with empty drafts; there is no other path.

`pending` is the newest emitted token: it is not in the cache yet, so `cache.length == tokens - 1` between rounds.
Hidden row i of a pass is the state that chose token i, which is the pair that an MTP head consumes. The first pass is
the prompt's last chunk, whose last row chooses the first token: a round with nothing drafted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
    tokens, draft, draft_seconds = request.row, Draft(), 0.0
    rows = prefill(backbone, tokens[request.padding :].to(backbone.device), cache)  # [T], the prompt's last chunk
    first = True
    while True:
        verified = len(draft.tokens) + 1
        hidden = backbone.forward(rows, cache)[-verified:]  # [k + 1, hidden]
        logits = backbone.logits(hidden).to(tokens.device)  # [k + 1, vocab]
        verdict = verify(draft.tokens, logits, tokens, request.sampler.choose)
        verify_seconds = clock.lap("prefill" if first else "verify")

        verdict, done = cut(verdict, tokens, request.stop)
        emitted = len(verdict.tokens)
        cache.commit(len(rows) - verified + emitted)
        tokens = torch.cat((tokens, tokens.new_tensor(verdict.tokens)))
        if not first:
            stats.count_round(len(draft.tokens), min(verdict.accepted, len(draft.tokens)), draft.source)
            lengths.observe(len(draft.tokens), verdict.accepted, draft_seconds, verify_seconds)
        first = False
        clock.emitted(emitted, cache)
        request.emit(verdict, logits[:emitted])
        if done or len(tokens) >= request.limit:
            return tokens

        room = min(request.limit - len(tokens), cache.max_rows) - 1  # a draft never outruns the token budget
        k = lengths.choose(min(room, drafter.max_draft))
        clock.lap("other")
        draft = drafter.propose(tokens[request.padding :].tolist(), hidden[emitted - 1], k) if k else Draft()
        assert len(draft.tokens) <= k
        rows = torch.cat((tokens[-1:], tokens.new_tensor(draft.tokens))).to(backbone.device)  # [k + 1]
        draft_seconds = clock.lap("draft")


def prefill(backbone: Decoder, prompt: Tensor, cache: KVCache) -> Tensor:
    """Commit all of prompt [n] but its last chunk, in passes of at most `cache.max_rows` rows; returns that chunk."""
    *chunks, last = torch.split(prompt, cache.max_rows)
    for chunk in chunks:
        backbone.forward(chunk, cache)
        cache.commit(len(chunk))
    return last


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
