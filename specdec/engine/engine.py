"""The engine: it owns every text in flight, and decodes all of them in shared passes.

Plain decoding is a round with an empty draft, one text is a batch of one; there is no other path. `pending` is the
newest emitted token: it is not in the cache yet, so `cache.length == tokens - 1` between rounds. Row i of a pass's
`States` chose token i, and an MTP head consumes this pair; the states have what the drafter's `aux_layers` ask for. The
last chunk of a prompt chooses the first token: a round with nothing drafted.

A pass reads chunks of prompts beside the pending tokens and drafts of all texts that decode: a long prompt does not
stop the others (`schedule.py`). The draft length decides who is drafted for, and how much, for all texts of a pass
together. A text's tokens depend on none of it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Several

import torch

from specdec.cache import CacheProvider, Conversations
from specdec.drafting.composite import proposer_of_text
from specdec.drafting.propose import propose_together
from specdec.drafting.protocol import Drafted, Drafter, DraftLength, FixedLength, NoDraft, bind_drafter
from specdec.engine.clock import PassClock
from specdec.engine.event import Event
from specdec.engine.schedule import DRAFT_ROWS, next_batch
from specdec.engine.sequence import Lockstep, Request, RowsChooser, Sequence, verify_all
from specdec.engine.stats import GenerationStats, Round
from specdec.engine.verify import Verdict
from specdec.model.decoder import Decoder
from specdec.util.threads import one_torch_thread, turn_to_compute


class Engine:
    """Decode many texts at once.

    `add` and `cancel` may be called from any thread, from callbacks of a pass too, and never wait for a pass. `step`
    runs in one thread at a time. Several engines on one backbone take turns pass by pass.
    """

    def __init__(
        self,
        backbone: Decoder,
        drafter: Drafter | None = None,
        lengths: DraftLength | None = None,
        caches: CacheProvider | None = None,
        max_batch: int = 1,
        stats: GenerationStats | None = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> None:
        """Check that the drafter fits the backbone; raises ValueError otherwise. `caches`: the provider of sequences'
        caches, which may hold the beginning of a new text. `max_batch`: sequences that have a cache at a time; further
        ones wait. `stats` is true after every pass. `on_round` gets every round of every sequence."""
        self.backbone, self.drafter = backbone, drafter or NoDraft()
        self.lengths = lengths or FixedLength(0)
        self.caches = caches or Conversations(backbone.new_cache)
        self.max_batch, self.stats, self.on_round = max_batch, stats or GenerationStats(), on_round
        with turn_to_compute(), bind_drafter(self.drafter, backbone):
            self._aux_layers = self.drafter.aux_layers
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []
        self._cancelled: list[Sequence] = []  # those that have a cache
        self._lock = threading.Lock()  # guards these three lists; held only while a list changes
        self._work = threading.Condition(self._lock)
        self._stepper: object | None = None  # the call of `step` that is under way
        self._clock = PassClock(self.stats, backbone.device)

    def add(self, request: Request) -> Sequence:
        """Queue `request`, whose prompt later steps read; return its sequence. Raises ValueError: the backbone has no
        adapter of this name."""
        sequence = Sequence(request, adapter=self.backbone.adapters.resolve(request.adapter))
        with self._work:
            self._waiting.append(sequence)
            self._work.notify_all()
        return sequence

    def add_lockstep(self, requests: Several[Request], chooser: RowsChooser) -> list[Sequence]:
        """Queue rows of one length whose tokens `chooser` picks together; return their sequences.

        None of them is drafted for. The rows run in one batch, whatever `max_batch` is, and end together. A request's
        own constraint is not looked at."""
        lockstep = Lockstep(chooser, [])
        resolve = self.backbone.adapters.resolve
        lockstep.members = [Sequence(request, lockstep, resolve(request.adapter)) for request in requests]
        with self._work:
            self._waiting.extend(lockstep.members)
            self._work.notify_all()
        return list(lockstep.members)

    def cancel(self, sequence: Sequence) -> None:
        """End `sequence` before the next pass; nothing happens when it has ended. Its cache stays usable for texts that
        begin as it did. Members of a lockstep end together."""
        with self._work:
            for one in sequence.lockstep.members if sequence.lockstep is not None else [sequence]:
                if one in self._waiting:
                    self._waiting.remove(one)
                if not one.ended:
                    one.finish = "cancelled"
                    self._cancelled.append(one)
            self._work.notify_all()
        if self._stepper is None:  # no call of `step` is under way, and perhaps none will come
            self._reap()

    def pause(self, sequence: Sequence) -> None:
        """Take the cache of `sequence`, which is in no pass, and leave it aside until `resume`."""
        with self._lock:
            self._waiting = deque(one for one in self._waiting if one is not sequence)
            self._active = [one for one in self._active if one is not sequence]
        sequence.pause(self.caches)

    def resume(self, sequence: Sequence) -> None:
        """Queue a paused sequence: its tokens are read again, as far as no cache holds them, and the text goes on."""
        with self._work:
            self._waiting.append(sequence)
            self._work.notify_all()

    @property
    def in_flight(self) -> int:
        """Return how many sequences have not ended, those that wait for a cache included."""
        with self._lock:
            return len(self._waiting) + sum(not sequence.ended for sequence in self._active)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until there is something to step for; return whether there is."""
        with self._work:
            idle = not (self._waiting or self._active or self._cancelled)
            found = self._work.wait_for(lambda: bool(self._waiting or self._active or self._cancelled), seconds)
        if idle:
            self._clock.skip()
        return found

    def step(self) -> list[Event]:
        """Run one pass, and return its events; an empty list when nothing is in flight or prompts are still read.

        An error of a request's own sampler or stop condition ends that sequence alone. Every other exception, Ctrl-C
        too, leaves all sequences where they were before the pass.
        """
        mine = object()
        try:
            with self._lock:
                assert self._stepper is None, "another call of step() is under way"
                self._stepper = mine
            events = [Event(sequence, Verdict(())) for sequence in self._reap()]
            self._admit()
            batch = next_batch(list(self._active))
            return events + self._pass(batch) if batch else events
        finally:
            if self._stepper is mine:
                self._stepper = None

    def run(self, requests: Iterable[Request]) -> Generator[Event, None, None]:
        """Decode `requests` to their ends, at most `max_batch` at a time, and yield the events of all passes.

        The next request is asked for when there is room for it. Sequences that have not ended when the iterator is
        closed, or an error or Ctrl-C comes, are cancelled. Raises what a sampler or a stop condition raised.
        """
        coming = iter(requests)
        try:
            while True:
                while self.in_flight < self.max_batch and (request := next(coming, None)) is not None:
                    self.add(request)
                if not self.in_flight:
                    return
                yield from self._checked_step()
        finally:
            self.close()

    def run_to_end(self) -> Generator[Event, None, None]:
        """Step until nothing is in flight, under the conditions of `run`."""
        try:
            while self.in_flight:
                yield from self._checked_step()
        finally:
            self.close()

    def close(self) -> None:
        """Cancel every sequence."""
        with self._lock:
            sequences = [*self._waiting, *self._active]
        for sequence in sequences:
            self.cancel(sequence)
        if self._stepper is None:
            self._reap()

    def _checked_step(self) -> list[Event]:
        events = self.step()
        for event in events:
            if event.sequence.error is not None:
                raise event.sequence.error
        return events

    def _reap(self) -> list[Sequence]:
        """Give back the caches of the cancelled sequences, and return these sequences."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            self._active = [sequence for sequence in self._active if sequence not in cancelled]
        for sequence in cancelled:
            sequence.end(self.caches)
        return cancelled

    def _admit(self) -> None:
        """Give caches to the sequences that wait, the oldest first, as far as there is room in the batch."""
        with self._lock:
            while self._waiting and (len(self._active) < self.max_batch or self._waiting[0].lockstep is not None):
                self._active.append(self._waiting.popleft())
        for sequence in self._active:  # after Ctrl-C an earlier sequence may still have no cache
            if sequence.waiting and sequence.begin(self.caches):
                for stats in self._stats_of(sequence):
                    stats.count_prompt(sequence.prompt_tokens, sequence.reused)

    def _pass(self, batch: list[Sequence]) -> list[Event]:
        clock, backbone = self._clock, self.backbone
        going_on = [sequence for sequence in batch if sequence.decoding]
        choosing = [sequence for sequence in batch if sequence.decoding or sequence.last_chunk]
        with turn_to_compute():
            other_seconds = clock.lap("other" if going_on else "prefill")
            for sequence in batch:
                if not sequence.decoding:
                    sequence.before_chunk(self.caches)
            prompt_rows = sum(sequence.next_rows for sequence in batch if not sequence.decoding)
            prepared = self._draft(going_on, prompt_rows)
            draft_seconds = clock.lap("draft")
            for sequence in batch:
                sequence.reserve(self.caches)
            rows = [sequence.rows().to(backbone.device) for sequence in batch]
            media = [one.media for one in batch] if any(one.media for one in batch) else ()
            caches = [one.conversation.cache for one in batch]
            states = backbone.forward_many(rows, caches, self._aux_layers, media)
            states_of = dict(zip(batch, states.split(list(map(len, rows))), strict=True))
            if choosing:
                chosen_from = [states_of[one].last[-len(one.draft.tokens) - 1 :] for one in choosing]
                adapters = [one.adapter for one, rows in zip(choosing, chosen_from, strict=True) for _ in rows]
                logits = backbone.logits(torch.cat(chosen_from), adapters)  # [sum of k + 1, vocab]
                parts = torch.split(logits.to(choosing[0].tokens.device), list(map(len, chosen_from)))
            else:
                parts = ()
        with one_torch_thread():
            verdicts = verify_all(choosing, parts)
            rounds = {one: one.draft.checked(verdicts[one].accepted) for one in going_on if one in verdicts}
            for sequence in batch:
                if (verdict := verdicts.get(sequence)) is not None:
                    sequence.commit(verdict, states_of[sequence])
                elif sequence not in choosing:
                    sequence.commit_chunk(states_of[sequence])
        verify_seconds = clock.lap_pass(prompt_rows / len(states))
        self._count(verdicts, rounds, (draft_seconds, verify_seconds, other_seconds), prompt_rows, prepared)
        events = [
            Event(one, verdicts[one], part[: len(verdicts[one].tokens)]) if one in verdicts else Event(one, Verdict(()))
            for one, part in zip(choosing, parts, strict=True)
        ]
        with self._lock:
            over = [one for one in choosing if one.ended and one not in self._cancelled]
            self._active = [one for one in self._active if one not in over]
        for sequence in over:
            sequence.end(self.caches)
        return events

    def _draft(self, sequences: list[Sequence], prompt_rows: int) -> bool:
        """Let constraints, where they leave no choice, and the drafter propose drafts for `sequences`, beside
        `prompt_rows` rows of prompts; return whether proposers looked through whole texts first, or read further."""
        alone = [sequence for sequence in sequences if sequence.lockstep is None]
        beside = prompt_rows + len(sequences) - len(alone)
        if not alone or not self.lengths.may_draft(len(alone), beside):
            return False
        forced = [sequence for sequence in alone if sequence.find_forced()]
        if self.drafter.max_draft == 0 and not forced and not any(one.request.prediction for one in alone):
            return False
        fresh = [sequence for sequence in alone if sequence.proposer is None]
        for sequence in fresh:
            cache, noise = sequence.conversation.cache, sequence.request.sampler.noise
            expected = sequence.request.prediction, sequence.prompt_tokens
            sequence.proposer = proposer_of_text(self.drafter, self.backbone, cache, noise, *expected)
        most = max(0, DRAFT_ROWS - len(sequences))
        drafts, caught_up = propose_together([one.open_end() for one in alone], self.lengths, beside, most)
        for sequence, draft in zip(alone, drafts, strict=True):
            sequence.take(draft)
        return caught_up or bool(fresh)

    def _count(
        self,
        verdicts: dict[Sequence, Verdict],
        rounds: dict[Sequence, Drafted],
        seconds: tuple[float, float, float],
        prompt_rows: int,
        prepared: bool,
    ) -> None:
        """Add a pass to the statistics: all `verdicts`, and the `rounds` among them, of sequences that had a token.
        `prepared`: the drafts of this pass took longer, because `_draft` returned True."""
        for sequence, verdict in verdicts.items():
            for stats in self._stats_of(sequence):
                stats.emitted += len(verdict.tokens)
        self._clock.after_pass(verdicts, self._active)
        draft_seconds, verify_seconds, _ = seconds
        if not rounds:
            self.lengths.observe_prompt(verify_seconds)
            return
        self.lengths.observe(list(rounds.values()), prompt_rows, 0.0 if prepared else draft_seconds, verify_seconds)
        for sequence, drafted in rounds.items():
            share = [one / len(rounds) for one in seconds]  # so that the rounds add up to the pass's time
            done = Round(drafted.sources, drafted.accepted, len(verdicts[sequence].tokens), *share)
            for stats in self._stats_of(sequence):
                stats.count_round(done)
            if self.on_round is not None:
                self.on_round(done)

    def _stats_of(self, sequence: Sequence) -> list[GenerationStats]:
        own = sequence.request.stats
        return [self.stats] if own is None else [self.stats, own]
