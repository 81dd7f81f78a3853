"""The loop. Plain decoding is this loop with empty drafts, one text is a batch of one; there is no other path.

`pending` is the newest emitted token: it is not in the cache yet, so `cache.length == tokens - 1` between rounds.
Hidden row i of a pass is the state that chose token i, which is the pair that an MTP head consumes; it goes on with
what leaves the layers that the drafter names as its `aux_layers`. A text's first pass is its prompt's last chunk, whose
last row chooses the first token: a round with nothing drafted.

Several texts share every pass, a new one's first too. Only a text that is alone is drafted for: on a CPU a row of
another text costs what a drafted row costs, and is never wrong. Texts whose logits processors look at all rows of a
batch go `in_step`: all of them begin with one pass, and go on together until the last one has ended.

Calls of `decode` may run at once, from several threads or from callbacks of each other: passes take turns, and all that
is known of a text is its call's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specdec.cache import MAX_ROWS, Conversation, Conversations, KVCache
from specdec.drafting.draft_length import DraftLength
from specdec.drafting.protocol import Draft, Drafter, Proposer, aux_layers_of, bound, drafted, proposer_for
from specdec.engine.sampling import Sampler
from specdec.engine.stats import GenerationStats, Round
from specdec.engine.verify import Choice, Verdict, verify
from specdec.model.decoder import Decoder
from specdec.util.threads import one_torch_thread, turn_to_compute


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


class InStep(Protocol):
    """Chooses for all rows of a batch at once, in place of each request's own `sampler` and `stop`."""

    def choose(self, rows: Sequence[Tensor], logits: Tensor) -> list[Choice]:
        """One choice for each of `rows` ([n] int64 each, of one length), from logits [rows, vocab] float32."""

    def ended(self, rows: Sequence[Tensor], choices: Sequence[Choice]) -> bool:
        """Whether no row goes on after `choices`, with which `rows` end now."""


class Decoded(NamedTuple):
    """A text that has ended: which request's, its row with what was emitted, and its cache, which holds all of the text
    but the last token, until another text goes on from it."""

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
    in_step: InStep | None = None,
) -> Generator[Decoded, None, None]:
    """Decode `requests`, up to `together` at a time; yields them as they end.

    The text of a request does not depend on the others, on `together`, or on what `conversations` has kept of earlier
    texts: a request that begins as one of them did goes on from its cache. `stats` is true after every round, of which
    `heard` is told then. `in_step`: see `InStep`; rows of one length, all of them at a time, and no drafts.

    Texts that have not ended when the iterator is closed, or an error or Ctrl-C comes, are handed to `conversations`.
    """
    kept = conversations or Conversations(backbone.new_cache)
    with turn_to_compute(), bound(drafter, backbone):
        aux_layers = aux_layers_of(drafter)
    clock = _Clock(stats)
    waiting = enumerate(requests)
    texts: list[_Text] = []
    proposer: Proposer | None = None
    proposes_for = None  # whose text it knows
    try:
        while True:
            fresh = 0
            while (fresh == 0 or in_step is not None) and len(texts) < together:
                if (following := next(waiting, None)) is None:
                    break
                texts.append(_Text(*following, backbone))
                texts[-1].begin(kept)
                texts[-1].prefill(kept, aux_layers)
                stats.count_prompt(len(texts[-1].rows) + texts[-1].cache.length, texts[-1].reused)
                fresh += 1
            if not texts:
                return
            going_on = len(texts) - fresh
            with turn_to_compute():
                other_seconds = clock.lap("prefill" if fresh else "other")
                draft = Draft()
                if going_on == len(texts) == 1 and in_step is None:
                    if proposer is None or proposes_for is not texts[0]:
                        proposer = proposer_for(drafter, backbone, texts[0].cache, texts[0].request.sampler.noise)
                        proposes_for = texts[0]
                    draft = texts[0].drafted(proposer, lengths)
                draft_seconds, k = clock.lap("draft"), len(draft.tokens)
                rows = [text.rows for text in texts]
                states = backbone.forward_many(rows, [text.cache for text in texts], aux_layers)
                hidden = torch.split(states, list(map(len, rows)))  # [rows, hidden] each
                logits = backbone.logits(torch.cat([part[-k - 1 :] for part in hidden]))  # [texts * (k + 1), vocab]
                logits = logits.to(texts[0].tokens.device)
            with one_torch_thread():
                if in_step is None:
                    # k is 0 where there are several
                    verdicts = [text.verify(draft, logits[i : i + k + 1]) for i, text in enumerate(texts)]
                else:
                    verdicts = _all_in_step(in_step, texts, logits)
                for text, verdict, part in zip(texts, verdicts, hidden, strict=True):
                    text.commit(k, verdict, part)
            verify_seconds = clock.lap("prefill" if fresh else "verify")
            emitted = sum(len(verdict.tokens) for verdict in verdicts)
            stats.emitted += emitted
            clock.emitted(texts)
            if going_on:
                accepted = verdicts[0].accepted  # 0 where there are several
                done = Round(draft.sources, accepted, emitted, draft_seconds, verify_seconds, other_seconds)
                for _ in range(going_on):
                    stats.count_round(done)
                if len(texts) == 1:
                    lengths.observe(draft.sources, accepted, draft_seconds, verify_seconds)
                if heard is not None:
                    heard(done)
            for i, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)):
                text.request.emit(verdict, logits[i : i + len(verdict.tokens)])
            for text in [text for text in texts if text.ended]:
                text.end(kept)
                texts.remove(text)
                yield Decoded(text.index, text.tokens[: text.n].clone(), text.cache)
    finally:
        for text in texts:
            text.end(kept)


def _all_in_step(in_step: InStep, texts: Sequence[_Text], logits: Tensor) -> list[Verdict]:
    """One token for each of `texts`, from logits [texts, vocab]."""
    choices = in_step.choose([text.tokens[: text.n] for text in texts], logits)
    for text, choice in zip(texts, choices, strict=True):
        text.tokens[text.n] = choice.token
    ended = in_step.ended([text.tokens[: text.n + 1] for text in texts], choices)
    return [Verdict((choice,), ended) for choice in choices]


class _Text:
    """A text on its way: tokens[:n] are emitted (prompt included), `rows` is what the next pass reads of it."""

    conversation: Conversation | None = None
    cache: KVCache
    reused = 0

    def __init__(self, index: int, request: Request, backbone: Decoder) -> None:
        self.index, self.request, self.backbone = index, request, backbone
        self.n, self.ended = len(request.row), False
        self.tokens = request.row.new_empty(request.limit + MAX_ROWS)  # a draft comes after what is emitted
        self.tokens[: self.n] = request.row
        self.rows = request.row[:0]
        self.hidden = torch.empty(0, dtype=backbone.dtype)  # [hidden], the state that chose the pending token

    def begin(self, kept: Conversations) -> None:
        """Take a cache with as much of the prompt in it as `kept` has."""
        request = self.request
        self.conversation = kept.begin(request.row[request.padding :], request.limit - request.padding)
        self.cache, self.reused = self.conversation.cache, self.conversation.cache.length
        self.conversation.tokens = self.tokens[request.padding :]

    def end(self, kept: Conversations) -> None:
        """Give the cache back, however the text has ended."""
        if self.conversation is not None:
            kept.end(self.conversation)

    def prefill(self, kept: Conversations, aux_layers: Sequence[int]) -> None:
        """Commit all of the prompt but its last chunk, which is what the next pass reads."""
        request = self.request
        prompt = request.row[request.padding + self.reused :].to(self.backbone.device)
        assert self.conversation is not None
        before = partial(kept.prefilling, self.conversation)
        self.rows = prefill(self.backbone, prompt, self.cache, request.watch, before, aux_layers)

    def drafted(self, proposer: Proposer, lengths: DraftLength) -> Draft:
        """A draft to follow the pending token, which `rows` then ends with."""
        n, request = self.n, self.request
        room = min(request.limit - n - 1, self.cache.max_rows - 1)  # no draft outruns the budget
        draft = drafted(proposer, lengths, self.tokens[request.padding : n].tolist(), self.hidden, room)
        if draft.tokens:
            self.tokens[n : n + len(draft.tokens)] = self.tokens.new_tensor(draft.tokens)
            self.rows = self.tokens[n - 1 : n + len(draft.tokens)].to(self.backbone.device)  # [k + 1]
        return draft

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        """What a pass chose, from logits [k + 1, vocab] of its last rows."""
        text = self.tokens[: self.n + len(draft.tokens) + 1]
        return verify(draft.tokens, logits, text, self.request.sampler.choose, self.request.stop)

    def commit(self, drafted: int, verdict: Verdict, hidden: Tensor) -> None:
        """Keep what `verdict` emits of a pass whose rows, the last `drafted` of them a draft, have the states hidden
        [rows, hidden]."""
        request, emitted = self.request, len(verdict.tokens)
        committed = len(self.rows) - drafted - 1 + emitted
        self.cache.commit(committed)
        if request.watch is not None:
            request.watch(hidden[:committed])
        self.n += emitted
        self.hidden = hidden[committed - 1]
        self.rows = self.tokens[self.n - 1 : self.n].to(self.backbone.device)  # [1], the pending token
        self.ended = verdict.ended or self.n >= request.limit


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
        with turn_to_compute():
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
