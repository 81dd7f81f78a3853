"""Answers of the backbone to prompts, many texts to a pass, with the hidden states that the passes compute anyway.

What: `generate_answers`. A text depends on its prompt and its number alone, so any worker may answer any prompt. Each
worker is a thread with an engine of its own; workers scale better than one pass whose every step is shared. The words
that a chat template puts before every prompt are computed once, and later texts go on from their states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Several
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from drafter.data.features import Features, best_of, kept_keys, likeliest, longest_text
from drafter.data.patience import PATIENT, Patience
from drafter.data.workers import in_workers
from specdec.cache import Conversation, KVCache
from specdec.cache.conversation import Keys
from specdec.cache.reuse import shared_beginning
from specdec.drafting.protocol import NoDraft
from specdec.engine.engine import Engine
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request, Sequence
from specdec.engine.verify import Choice, Verdict
from specdec.model.decoder import Decoder
from specdec.model.states import States
from specdec.util.threads import one_torch_thread

TOGETHER = 32  # texts at a time

Numbered = Iterator[tuple[int, Tensor]]


def generate_answers(
    backbone: Decoder,
    prompts: Iterable[Tensor],
    *,
    layers: Several[int],
    aux_layers: Several[int] = (),
    max_new_tokens: int,
    eos_ids: frozenset[int],
    temperatures: Several[float] = (0.0,),
    seed: int = 0,
    first: int = 0,
    max_batch: int = TOGETHER,
    workers: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    patience: Patience = PATIENT,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, Features]]:
    """Answer `prompts` ([n] int64); yield (number of the prompt, its text) in the order in which the texts end.

    Prompts are numbered from `first` on. `temperatures` are taken in turn by number, 0 is greedy; a text ends with a
    token of `eos_ids`. Hidden states, the outputs of `aux_layers` and the K/V of `layers` are kept as `dtype`. The last
    token of a text is not among its features: no pass has read that token. A sliding layer's keys reach back only as
    far as its ring, so texts end where the shortest ring does. `max_batch`: texts at a time; `workers`: threads that
    share the texts, each on a core of its own. Neither changes a text. When `patience` is over no text begins, and the
    texts under way end where they are and are yielded too. `on_tokens` is told the tokens of each round, by any worker.
    """
    stopped = threading.Event()
    each = partial(
        _generate_answers,
        backbone,
        layers=layers,
        aux_layers=aux_layers,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        temperatures=temperatures,
        seed=seed,
        max_batch=-(-max_batch // workers),
        dtype=dtype,
        stopped=stopped,
        patience=patience,
        on_tokens=on_tokens,
    )
    numbered = enumerate(prompts, first)
    return each(numbered) if workers == 1 else in_workers(each, numbered, workers, stopped)


def _generate_answers(
    backbone: Decoder,
    prompts: Numbered,
    *,
    layers: Several[int],
    aux_layers: Several[int],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    temperatures: Several[float],
    seed: int,
    max_batch: int,
    dtype: torch.dtype,
    stopped: threading.Event,
    patience: Patience,
    on_tokens: Callable[[int], None],
) -> Iterator[tuple[int, Features]]:
    """Answer the `prompts` of one worker, with their numbers.

    When `stopped` is set, all texts end where they are: an answer of a large model may be minutes from its own end.
    """
    longest = longest_text(backbone, layers)
    under_way: dict[Request, _Answer] = {}

    def ending() -> Callable[[Tensor, Choice], bool]:
        began = patience.now()
        return lambda tokens, choice: choice.token in eos_ids or stopped.is_set() or patience.over(began)

    # Without a drafter: these are the plain model's texts either way, and several share a pass.
    beginnings = Beginnings(backbone, len(aux_layers))
    engine = Engine(backbone, NoDraft(aux_layers), caches=beginnings, max_batch=max_batch)

    def requests() -> Iterator[Request]:
        while not patience.over() and (found := next(prompts, None)) is not None:
            number, prompt = found
            temperature = temperatures[number % len(temperatures)]
            prompt = prompt[: longest - 1]
            answer = _Answer(number, len(prompt), greedy=not temperature)
            request = Request(
                prompt,
                min(len(prompt) + max_new_tokens, longest),
                Sampler.at_temperature(temperature, seed + number),
                ending(),
                on_states=answer.states.append,
            )
            under_way[request] = answer
            yield request

    with closing(engine.run(requests())) as events:
        for sequence, verdict, logits in events:
            answer = under_way[sequence.request]
            assert logits is not None, "nobody cancels"
            answer.take(verdict, logits)
            on_tokens(len(verdict.tokens))
            if sequence.ended:
                del under_way[sequence.request]
                yield answer.number, answer.features(backbone, sequence, layers, aux_layers, dtype, beginnings)


@dataclass
class _Answer:
    """Keep what passes computed of one text: `states` of the rows of each pass, and `best`, the greedy choice of every
    emitted token."""

    number: int
    prompt_tokens: int
    greedy: bool
    states: list[States] = field(default_factory=list)
    best: list[int] = field(default_factory=list)

    def take(self, verdict: Verdict, logits: Tensor) -> None:
        """Note the tokens that greedy decoding would have emitted, from logits [emitted, vocab]."""
        self.best.extend(verdict.tokens if self.greedy else likeliest(logits))

    def features(
        self,
        backbone: Decoder,
        sequence: Sequence,
        layers: Several[int],
        aux_layers: Several[int],
        dtype: torch.dtype,
        beginnings: Beginnings,
    ) -> Features:
        """Return the features of the ended text, without its last token; hand its beginning to `beginnings` for later
        texts."""
        known: _Begun = sequence.conversation.notes["begun"]
        states, answer = States.cat((known.states, *self.states)), self.prompt_tokens  # n rows
        asked = torch.cat((known.best, best_of(backbone, states.last[len(known.best) : answer - 1])))  # [answer - 1]
        row, cache = sequence.row.clone(), sequence.conversation.cache
        best = torch.cat((asked, asked.new_tensor(self.best)))  # [n]
        with one_torch_thread():
            stored = states.map(lambda each: each.to(dtype))
            aux = dict(zip(aux_layers, stored.aux, strict=True))
            text = Features(row[:-1], stored.last, best, kept_keys(cache, layers, dtype), answer, aux)
        beginnings.keep(_Begun(row[: answer - 1], states[: answer - 1].map(Tensor.clone), asked, cache))
        return text


class _Begun(NamedTuple):
    """Keep the first n tokens of a text: `tokens` [n], their `states`, `best` [n], and their cache."""

    tokens: Tensor
    states: States
    best: Tensor
    cache: KVCache


class Beginnings:
    """Give a text the cache of an ended text, with the states of the tokens that both texts begin with.

    Those tokens are not computed again, and no new memory is allocated. Chat templates put the same words before every
    prompt.
    """

    _SPARE = 4  # caches that wait for a text which begins as theirs did: one in five prompts has a system message
    _MODEST = 512  # positions: the cache of a longer text is let go, or all would come to be as large as the largest

    def __init__(self, backbone: Decoder, aux: int = 0) -> None:
        """Begin without any cache. `aux`: how many aux layers the passes have."""
        self._backbone, self._aux = backbone, aux
        self._kept = list[_Begun]()

    def acquire(self, prompt: Tensor, longest: int, media: Keys = (), adapter: str = "") -> Conversation:
        """Return a conversation for a text that begins with `prompt` [n] int64.

        The cache is a new one while there are few of them, else the kept one that shares most of the prompt's first n -
        1 tokens. The conversation's note "begun" has the states of those tokens. Prompts have no media, and all of them
        one adapter.
        """
        assert not media, "texts with media are not collected"
        if len(self._kept) < self._SPARE:
            backbone = self._backbone
            with one_torch_thread():  # many small ones
                cache = backbone.new_cache(adapter=adapter)
            none = torch.empty(0, backbone.spec.hidden_size, dtype=backbone.dtype, device=backbone.device)
            states, best = States(none, (none,) * self._aux), torch.empty(0, dtype=torch.int64, device=backbone.device)
            known = _Begun(prompt[:0], states, best, cache)
        else:
            shared = [shared_beginning(old.tokens, prompt[:-1]) for old in self._kept]
            most = max(shared)
            tokens, states, best, cache = self._kept.pop(shared.index(most))
            cache.rewind(most)
            known = _Begun(tokens[:most], states[:most], best[:most], cache)
        return Conversation(known.cache, notes={"begun": known})

    def reserve(self, conversation: Conversation, positions: int) -> None:
        """Do nothing: nobody counts bytes here."""

    def before_chunk(self, conversation: Conversation, left: int, chunk: int) -> None:
        """Make no ring checkpoint: a cache only ever goes back as far as its rings allow."""

    def release(self, conversation: Conversation) -> None:
        """Let the cache go: `keep` takes back a cache that serves again, with its states."""

    def keep(self, text: _Begun) -> None:
        """Keep `text`, so that later texts can begin with its tokens."""
        if text.cache.length <= self._MODEST and text.cache.rewindable(0):
            self._kept = [*self._kept[-self._SPARE :], text]
