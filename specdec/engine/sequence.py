"""One text in flight: its request, its tokens, its cache, and the rows that the next pass reads of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.cache import MAX_ROWS, CacheProvider, Conversation
from specdec.cache.conversation import needed_positions
from specdec.drafting.propose import OpenEnd
from specdec.drafting.protocol import Draft, Proposer
from specdec.engine.constraints import Constraint, ForcedTokens, constrained
from specdec.engine.sampling import Sampler
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice, Verdict, verify
from specdec.model.media import MediaBlock, check_media, chunk_end
from specdec.model.states import States


@dataclass(frozen=True, eq=False)
class Request:
    """Hold one text to decode.

    `row` [n] int64: `padding` padding tokens, then the prompt. Processors and `stop` see the whole row, the model only
    the prompt. `limit`: tokens at which the row is full, padding included. `stop(tokens, choice)` is asked after every
    emitted token, in order. `on_states`, where given, receives the states of the rows that are committed to the
    cache, prompt included, in order, with those of the drafter's `aux_layers`. Rows that the cache had before are not
    among them. `stats`: counts this text besides the engine's own statistics. `media`: the prompt's pictures and sound,
    in their order, at positions that do not count padding. `constraint`: says which tokens may follow which; the text
    ends where it says that nothing may. `pins`: lengths at which later texts are likely to part from this one; the
    cache can go back there. `prediction`: the tokens of an expected answer, of which drafts are made where it fits.
    `adapter`: the name of the backbone's adapter for this text; None: the backbone's default, "none": no adapter.

    Raises ValueError when the blocks of `media` are out of order or outside of the prompt.
    """

    row: Tensor
    limit: int
    sampler: Sampler
    stop: Callable[[Tensor, Choice], bool]
    padding: int = 0
    on_states: Callable[[States], None] | None = None
    stats: GenerationStats | None = None
    media: tuple[MediaBlock, ...] = ()
    constraint: Constraint | None = None
    pins: frozenset[int] = frozenset()
    prediction: Tokens[int] = ()
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_media(self.media, len(self.row) - self.padding)


class RowsChooser(Protocol):
    """Choose for all rows of a batch at once, in place of each request's own `sampler` and `stop`."""

    def choose(self, rows: Tokens[Tensor], logits: Tensor) -> list[Choice]:
        """Return a choice for each of `rows` ([n] int64 each, of one length), from logits [rows, vocab] float32."""

    def ended(self, rows: Tokens[Tensor], choices: Tokens[Choice]) -> bool:
        """Return whether no row goes on after `choices`, with which `rows` end now."""


@dataclass(eq=False)
class Lockstep:
    """Hold rows of a batch whose tokens `chooser` picks together: all are in every pass from the first token on."""

    chooser: RowsChooser
    members: list[Sequence]

    @property
    def ready(self) -> bool:
        """Return whether every member has at most its last chunk to read."""
        return all(member.last_chunk for member in self.members)

    def verify(self, logits: Tensor) -> list[Verdict]:
        """Return one token for every member, chosen from logits [members, vocab]."""
        choices = self.chooser.choose([member.row for member in self.members], logits)
        for member, choice in zip(self.members, choices, strict=True):
            member.tokens[member.length] = choice.token
        ended = self.chooser.ended([member.tokens[: member.length + 1] for member in self.members], choices)
        return [Verdict((choice,), ended) for choice in choices]


class Sequence:
    """Hold a text in flight. `tokens[:length]` are emitted, prompt included; `finish` says how the text ended.

    `reused`: how many of the prompt's tokens were in the cache that the sequence was given. `adapter`: the name in its
    cache of the adapter that it has, "" for none. The caller that added the
    sequence may read `conversation`, `row` and `finish`; everything else is the engine's.
    """

    def __init__(self, request: Request, lockstep: Lockstep | None = None, adapter: str = "") -> None:
        self.request, self.lockstep, self.adapter = request, lockstep, adapter
        self.length = len(request.row)
        self.tokens = request.row.new_empty(request.limit + MAX_ROWS)  # a draft comes after what is emitted
        self.tokens[: self.length] = request.row
        self.finish: str | None = None  # "stop", "length", "cancelled" or "error"
        self.error: Exception | None = None
        self.reused = 0
        self.draft = Draft()  # the draft that the next pass checks
        self.proposer: Proposer | None = None
        self._matcher = request.constraint.start() if request.constraint is not None else None
        self._forced = ForcedTokens(())  # what the constraint says of the next tokens
        self.states: States | None = None  # of the row that chose the pending token; None: a prompt to read
        self.chunk = MAX_ROWS  # rows of the prompt that the next pass reads, but for the edges of media
        self._ids = request.row[request.padding :].tolist()  # the tokens that proposers see, kept as they grow
        self._conversation: Conversation | None = None
        self._unread = len(self._ids)  # tokens that no pass has read; once the text is decoded, none
        self._media = deque(block.embedded_once() for block in request.media)  # but for those that were read
        self._begun = False

    def __repr__(self) -> str:
        return f"<Sequence of {self.length} tokens, {self.finish or 'in flight'}>"

    @property
    def row(self) -> Tensor:
        """Return the row [n] int64 with all emitted tokens, padding included."""
        return self.tokens[: self.length]

    @property
    def conversation(self) -> Conversation:
        """Return the cache that the sequence was given, with its tokens; the sequence must not be `waiting`."""
        assert self._conversation is not None, "the sequence waits for a cache"
        return self._conversation

    @property
    def ended(self) -> bool:
        """Return whether the text has ended, for whatever reason `finish` says."""
        return self.finish is not None

    @property
    def waiting(self) -> bool:
        """Return whether the sequence has no cache yet."""
        return self._conversation is None

    @property
    def decoding(self) -> bool:
        """Return whether the prompt was read and the first token was chosen."""
        return self.states is not None

    @property
    def prompt_tokens(self) -> int:
        """Return the number of the prompt's tokens, padding left out."""
        return self.request.row.shape[0] - self.request.padding

    @property
    def next_rows(self) -> int:
        """Return how many of the sequence's rows the next pass has."""
        if self.decoding:
            return len(self.draft.tokens) + 1
        read, rows = len(self._ids) - self._unread, min(self._unread, self.chunk)
        if self.request.pins and self.conversation.marking:  # a mark is made between two chunks
            rows = min((pin - read for pin in self.request.pins if read < pin < read + rows), default=rows)
        return rows if not self._media else chunk_end(self._media, read, len(self._ids), rows) - read

    @property
    def last_chunk(self) -> bool:
        """Return whether the next pass reads the last of the prompt, and so chooses a token."""
        return self._conversation is not None and self._unread == self.next_rows

    def begin(self, caches: CacheProvider) -> bool:
        """Take a cache from `caches`, with as much of the text in it as `caches` has; return whether it is the
        sequence's first one."""
        request, first = self.request, not self._begun
        text = self.tokens[request.padding : self.length]
        places = [block.place for block in request.media]
        self._conversation = caches.acquire(text, request.limit - request.padding, places, self.adapter)
        self._begun = True
        self.reused = self.conversation.cache.length if first else self.reused
        self._unread -= self.conversation.cache.length
        self._forget_media()
        self.conversation.tokens = self.tokens[request.padding :]
        self.conversation.pins = request.pins
        return first

    def pause(self, caches: CacheProvider) -> None:
        """Give the cache back to `caches`; with the next one, the text's tokens are read again as a prompt is."""
        self.end(caches)
        self._conversation, self.states, self.proposer, self.draft = None, None, None, Draft()
        self._unread = len(self._ids)
        self._media = deque(block.embedded_once() for block in self.request.media)

    def end(self, caches: CacheProvider) -> None:
        """Give the cache back to `caches`."""
        if self._conversation is not None:
            caches.release(self._conversation)

    def fail(self, error: Exception) -> None:
        """Note the error of the request's own sampler or stop condition: the text ends before this pass."""
        self.error, self.finish = error, "error"

    def rows(self) -> Tensor:
        """Return the rows of the next pass, [rows] int64: a chunk of the prompt, or the pending token and the draft."""
        begin = self.length - (1 if self.decoding else self._unread)
        return self.tokens[begin : begin + self.next_rows]

    @property
    def media(self) -> Tokens[MediaBlock]:
        """Return the blocks of the prompt that no pass has read whole."""
        return self._media

    def before_chunk(self, caches: CacheProvider) -> None:
        """Tell `caches` that a chunk of the prompt comes next."""
        caches.before_chunk(self.conversation, self._unread, self.next_rows)

    def reserve(self, caches: CacheProvider) -> None:
        """Let `caches` make room for the rows of the next pass, where they are beyond what was reserved."""
        end = self.conversation.cache.length + self.next_rows
        if end > self.conversation.positions:
            caches.reserve(self.conversation, needed_positions(end, self.request.limit - self.request.padding))

    def find_forced(self) -> bool:
        """Find out which tokens have to come next; return whether there are any."""
        if self._matcher is None:
            return False
        self._follow()
        self._forced = ForcedTokens(self._matcher.forced())
        return self._forced.max_draft > 0

    def _follow(self) -> None:
        """Bring the constraint to the end of the text: a pass that was interrupted may have gone beyond."""
        assert self._matcher is not None
        self._matcher.rewind(self.length - len(self.request.row))

    def open_end(self) -> OpenEnd:
        """Return the open end that a draft follows, with no more room than the request's limit and the cache leave."""
        proposer = self._forced if self._forced.max_draft else self.proposer
        assert proposer is not None
        assert self.states is not None
        room = min(self.request.limit - self.length, self.conversation.cache.max_rows) - 1
        return OpenEnd(proposer, self._ids, self.states, room)

    def take(self, draft: Draft) -> None:
        """Let the next pass check `draft`, as far as the constraint allows it."""
        if self._matcher is not None and draft.tokens:
            draft = draft.allowed(self._matcher.valid(draft.tokens))
        self.draft = draft
        if draft.tokens:
            end = self.length + len(draft.tokens)
            self.tokens[self.length : end] = self.tokens.new_tensor(draft.tokens)

    def verify(self, logits: Tensor) -> Verdict:
        """Return the verdict of a pass, from logits [k + 1, vocab] of its last rows."""
        text = self.tokens[: self.length + len(self.draft.tokens) + 1]
        sampler, stop = self.request.sampler, self.request.stop
        if self._matcher is None:
            return verify(self.draft.tokens, logits, text, sampler.choose, stop)
        self._follow()
        return verify(self.draft.tokens, logits, text, *constrained(self._matcher, sampler, stop))

    def commit_chunk(self, states: States) -> None:
        """Keep a chunk of the prompt, whose rows have these `states`; more of the prompt follows."""
        self._commit(len(states), states)
        self._unread -= len(states)
        self._forget_media()

    def commit(self, verdict: Verdict, states: States) -> None:
        """Keep the rows of a pass that `verdict` emits. `states`: of all rows of this text in the pass."""
        emitted = verdict.tokens
        committed = len(states) - len(self.draft.tokens) - 1 + len(emitted)
        self._commit(committed, states)
        self._unread = 0
        self._media.clear()
        self.length += len(emitted)
        self._ids.extend(emitted)
        self.states, self.draft = states[committed - 1], Draft()
        if verdict.ended:
            self.finish = "stop"
        elif self.length >= self.request.limit:
            self.finish = "length"

    def _forget_media(self) -> None:
        """Let go of the media that the cache holds, with their rows."""
        while self._media and self._media[0].end <= len(self._ids) - self._unread:
            self._media.popleft()

    def _commit(self, rows: int, states: States) -> None:
        self.conversation.cache.commit(rows)
        if self.request.on_states is not None:
            self.request.on_states(states[:rows])


def verify_all(choosing: list[Sequence], logits: Tokens[Tensor]) -> dict[Sequence, Verdict]:
    """Return the verdicts of `choosing`, from logits [k + 1, vocab] of each; none where a sequence's own code fails."""
    verdicts: dict[Sequence, Verdict] = {}
    of = dict(zip(choosing, logits, strict=True))
    for sequence in choosing:
        if sequence.error is not None or sequence in verdicts:
            continue
        members = [sequence] if sequence.lockstep is None else sequence.lockstep.members
        try:
            if sequence.lockstep is None:
                verdicts[sequence] = sequence.verify(of[sequence])
            else:
                found = sequence.lockstep.verify(torch.cat([of[member] for member in members]))
                verdicts.update(zip(members, found, strict=True))
        except Exception as error:
            for member in members:
                member.fail(error)
    return verdicts
