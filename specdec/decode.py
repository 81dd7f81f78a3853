"""The loop. Plain decoding is this loop with empty drafts, one text is a batch of one; there is no other path.

`pending` is the newest emitted token: it is not in the cache yet, so `cache.length == tokens - 1` between rounds.
Hidden row i of a pass is the state that chose token i, which is the pair that an MTP head consumes; it goes on with
what leaves the layers that the drafter names as its `aux_layers`. A text's first pass is its prompt's last chunk, whose
last row chooses the first token: a round with nothing drafted.

Several texts share every pass, a new one's first too. Only a text that is alone is drafted for: on a CPU a row of
another text costs what a drafted row costs, and is never wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.cache import Conversations, KVCache
from specdec.control import DraftLength
from specdec.drafting import Draft, Drafter, aux_layers_of, drafted
from specdec.model.decoder import Decoder
from specdec.sampling import Sampler
from specdec.stats import GenerationStats, Round
from specdec.threads import one_torch_thread
from specdec.verify import Choice, Verdict, cut, verify


@dataclass(frozen=True)
class Request:
    """One text to decode.

    `row` [n] int64: `padding` padding tokens, then the prompt; processors and `stop` see all of it, the model only the
    prompt. `limit`: tokens at which the row is full, padding included. `stop(tokens, choice)` is asked after every
    emitted token, in order; `emit(verdict, logits)` hears what a round emitted and the logits [emitted, vocab] that it
    was chosen from. `watch(hidden)`, where given, hears the hidden states [rows, hidden] of what is committed to the
    cache, prompt included, in order, each followed by those of the drafter's `aux_layers`.
    """

    row: Tensor
    limit: int
    sampler: Sampler
    stop: Callable[[Tensor, Choice], bool]
    emit: Callable[[Verdict, Tensor], None]
    padding: int = 0
    watch: Callable[[Tensor], None] | None = None


class Decoded(NamedTuple):
    """A text that has ended: which request's, its row with what was emitted, and its cache, which holds all of the text
    but the last token."""

    number: int
    row: Tensor
    cache: KVCache


def decode(
    backbone: Decoder,
    drafter: Drafter,
    lengths: DraftLength,
    requests: Iterable[Request],
    stats: GenerationStats,
    together: int = 1,
    conversations: Conversations | None = None,
    heard: Callable[[Round], None] | None = None,
) -> Iterator[Decoded]:
    """Decode `requests`, up to `together` at a time; yields them as they end.

    The text of a request does not depend on the others, on `together`, or on what `conversations` has kept of earlier
    texts: a request that begins as one of them did goes on from its cache. `stats` is true after every round, of which
    `heard` is told then.
    """
    kept = conversations or Conversations(backbone.new_cache)
    aux_layers = aux_layers_of(drafter)
    clock = _Clock(stats)
    waiting = enumerate(requests)
    texts: list[_Text] = []
    drafted_for = None  # whom the drafter follows
    while True:
        fresh = next(waiting, None) if len(texts) < together else None
        if fresh is not None:
            texts.append(_Text(*fresh, backbone, kept, aux_layers))
            stats.count_prompt(len(texts[-1].rows) + texts[-1].cache.length, texts[-1].reused)
        if not texts:
            return
        other_seconds = clock.lap("other" if fresh is None else "prefill")
        draft = Draft()
        if fresh is None and len(texts) == 1:
            if drafted_for is not texts[0]:
                drafter.start(texts[0].cache, texts[0].request.sampler.noise)
                drafted_for = texts[0]
            draft = texts[0].drafted(drafter, lengths)
        draft_seconds, k = clock.lap("draft"), len(draft.tokens)
        rows = [text.rows for text in texts]
        states = backbone.forward_many(rows, [text.cache for text in texts], aux_layers)
        hidden = torch.split(states, list(map(len, rows)))  # [rows, hidden] each
        logits = backbone.logits(torch.cat([part[-k - 1 :] for part in hidden]))  # [texts * (k + 1), vocab]
        logits = logits.to(texts[0].tokens.device)
        with one_torch_thread():
            verdicts = [
                text.take(draft, hidden[i], logits[i : i + k + 1])  # k is 0 where there are several
                for i, text in enumerate(texts)
            ]
        verify_seconds = clock.lap("verify" if fresh is None else "prefill")
        emitted = sum(len(verdict.tokens) for verdict in verdicts)
        stats.emitted += emitted
        clock.emitted(texts)
        if len(texts) > (fresh is not None):
            accepted = verdicts[0].accepted  # 0 where there are several
            done = Round(draft.sources, accepted, emitted, draft_seconds, verify_seconds, other_seconds)
            for _ in range(len(texts) - (fresh is not None)):
                stats.count_round(done)
            if len(texts) == 1:
                lengths.observe(draft.sources, accepted, draft_seconds, verify_seconds)
            if heard is not None:
                heard(done)
        for i, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)):
            text.request.emit(verdict, logits[i : i + len(verdict.tokens)])
        played, texts = texts, [text for text in texts if not text.ended]
        for text in played:
            if text.ended:
                kept.end(text.conversation)
                yield Decoded(text.index, text.tokens[: text.n].clone(), text.cache)


class _Text:
    """A text on its way: tokens[:n] are emitted (prompt included), `rows` is what the next pass reads of it."""

    def __init__(
        self, index: int, request: Request, backbone: Decoder, kept: Conversations, aux_layers: Sequence[int]
    ) -> None:
        self.index, self.request, self.backbone = index, request, backbone
        self.conversation = kept.begin(request.row[request.padding :], request.limit - request.padding)
        self.cache, self.reused = self.conversation.cache, self.conversation.cache.length
        self.n, self.ended = len(request.row), False
        self.tokens = request.row.new_empty(request.limit + self.cache.max_rows)  # a draft comes after what is emitted
        self.tokens[: self.n] = request.row
        self.conversation.tokens = self.tokens[request.padding :]
        prompt = request.row[request.padding + self.reused :].to(backbone.device)
        before = partial(kept.prefilling, self.conversation)
        self.rows = prefill(backbone, prompt, self.cache, request.watch, before, aux_layers)
        self.hidden = torch.empty(0)  # [hidden], the state that chose the pending token

    def drafted(self, drafter: Drafter, lengths: DraftLength) -> Draft:
        """A draft to follow the pending token, which `rows` then ends with."""
        n, request = self.n, self.request
        room = min(request.limit - n - 1, self.cache.max_rows - 1)  # no draft outruns the budget
        draft = drafted(drafter, lengths, self.tokens[request.padding : n].tolist(), self.hidden, room)
        if draft.tokens:
            self.tokens[n : n + len(draft.tokens)] = self.tokens.new_tensor(draft.tokens)
            self.rows = self.tokens[n - 1 : n + len(draft.tokens)].to(self.backbone.device)  # [k + 1]
        return draft

    def take(self, draft: Draft, hidden: Tensor, logits: Tensor) -> Verdict:
        """Commit what a pass chose; hidden [rows, hidden] of all its rows, logits [k + 1, vocab] of the last."""
        k, request = len(draft.tokens), self.request
        verdict = verify(draft.tokens, logits, self.tokens[: self.n + k], request.sampler.choose)
        self.tokens[self.n + verdict.accepted] = verdict.tokens[-1]
        verdict, done = cut(verdict, self.tokens[: self.n + len(verdict.tokens)], request.stop)
        emitted = len(verdict.tokens)
        committed = len(self.rows) - k - 1 + emitted
        self.cache.commit(committed)
        if request.watch is not None:
            request.watch(hidden[:committed])
        self.n += emitted
        self.hidden = hidden[committed - 1]
        self.rows = self.tokens[self.n - 1 : self.n].to(self.backbone.device)  # [1], the pending token
        self.ended = done or self.n >= request.limit
        return verdict


def prefill(
    backbone: Decoder,
    prompt: Tensor,
    cache: KVCache,
    watch: Callable[[Tensor], None] | None = None,
    before: Callable[[int, int], None] = lambda left, chunk: None,
    aux_layers: Sequence[int] = (),
) -> Tensor:
    """Commit all of prompt [n] but its last chunk, in passes of at most `cache.max_rows` rows; returns that chunk.

    `before(left, chunk)` is called ahead of each chunk, the last one too: of `left` tokens to come, `chunk` are next.
    """
    *chunks, last = torch.split(prompt, cache.max_rows)
    left = len(prompt)
    for chunk in chunks:
        before(left, len(chunk))
        hidden = backbone.forward(chunk, cache, aux_layers)
        cache.commit(len(chunk))
        left -= len(chunk)
        if watch is not None:
            watch(hidden)
    before(left, len(last))
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

    def emitted(self, texts: list[_Text]) -> None:
        self.stats.timeline.append((time.perf_counter() - self.began, self.stats.emitted))
        self.stats.cache_bytes = max(self.stats.cache_bytes, sum(text.cache.nbytes for text in texts))
