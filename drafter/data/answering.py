"""Prompts answered by the backbone, many texts to a pass, with the states that its passes had anyway.

What: `answered`. A text depends on its prompt and its number alone, so any worker may answer any prompt: workers are
threads, each with a pass of its own, which scales better than a pass whose every step is shared. What a chat template
puts before every prompt is computed once and goes on from text to text. An answer costs a pass per token of each text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from drafter.data.features import Features, best_of, kept_keys, likeliest, longest_text, parted
from drafter.data.patience import PATIENT, Patience
from specdec.cache import Conversations, KVCache
from specdec.drafting.draft_length import FixedLength
from specdec.drafting.protocol import NoDraft
from specdec.engine.engine import Request, decode
from specdec.engine.sampling import Sampler
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice, Verdict
from specdec.model.decoder import Decoder
from specdec.util.threads import one_torch_thread

TOGETHER = 32  # texts at a time
_SPARE = 4  # caches that wait for a text which begins as theirs did: one in five prompts has a system message
_MODEST = 512  # positions: the cache of a longer text is let go, or all would come to be as large as the largest

Numbered = Iterator[tuple[int, Tensor]]
Item = TypeVar("Item")


def answered(
    backbone: Decoder,
    prompts: Iterable[Tensor],
    *,
    layers: Sequence[int],
    aux_layers: Sequence[int] = (),
    max_new_tokens: int,
    ends: frozenset[int],
    temperatures: Sequence[float] = (0.0,),
    seed: int = 0,
    first: int = 0,
    together: int = TOGETHER,
    workers: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    patience: Patience = PATIENT,
    heard: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, Features]]:
    """(number of the prompt, its text) for each of `prompts` ([n] int64), in the order in which they end.

    Prompts are numbered from `first` on. `temperatures` are taken in turn by number, 0 is greedy; a text ends with a
    token of `ends`. States, those that leave `aux_layers` too, and the K/V of `layers` are kept as `dtype`. The last
    token of a text is not among its features: nothing was computed from it. A sliding layer's keys reach back only as
    far as its ring, so texts end where the shortest ring does. `together`: texts at a time; `workers`: threads that
    share them, each on a core of its own. Neither changes a text. When `patience` is over no text begins, and those
    under way end where they are and are handed out too. `heard` is told the tokens of each round, by any worker.
    """
    stopped = threading.Event()
    each = partial(
        _answered,
        backbone,
        layers=layers,
        aux_layers=aux_layers,
        max_new_tokens=max_new_tokens,
        ends=ends,
        temperatures=temperatures,
        seed=seed,
        together=-(-together // workers),
        dtype=dtype,
        stopped=stopped,
        patience=patience,
        heard=heard,
    )
    numbered = enumerate(prompts, first)
    return each(numbered) if workers == 1 else _side_by_side(each, numbered, workers, stopped)


def _answered(
    backbone: Decoder,
    prompts: Numbered,
    *,
    layers: Sequence[int],
    aux_layers: Sequence[int],
    max_new_tokens: int,
    ends: frozenset[int],
    temperatures: Sequence[float],
    seed: int,
    together: int,
    dtype: torch.dtype,
    stopped: threading.Event,
    patience: Patience,
    heard: Callable[[int], None],
) -> Iterator[tuple[int, Features]]:
    """What one worker does of `answered`: the `prompts` that it gets, with their numbers. All texts end where they are
    when it is `stopped`: one of a large model may be minutes from its own end."""
    longest = longest_text(backbone, layers)
    numbers: list[int] = []  # of the requests, in their order
    spare = _Spare(backbone, (1 + len(aux_layers)) * backbone.spec.hidden_size)
    watched: dict[int, list[Tensor]] = {}
    chosen: dict[int, list[int]] = {}  # for each emitted token
    prompted: dict[int, Tensor] = {}  # and for each token of the prompt but the last, as far as it is known
    begins: dict[int, int] = {}

    def ending() -> Callable[[Tensor, Choice], bool]:
        began = patience.now()
        return lambda tokens, choice: choice.token in ends or stopped.is_set() or patience.over(began)

    def requests() -> Iterator[Request]:
        while not patience.over() and (found := next(prompts, None)) is not None:
            number, prompt = found
            numbers.append(number)
            temperature = temperatures[number % len(temperatures)]
            prompt = prompt[: longest - 1]
            known = spare.take(prompt)
            watched[number], prompted[number] = [known.hidden], known.best
            chosen[number], begins[number] = [], len(prompt)
            yield Request(
                prompt,
                min(len(prompt) + max_new_tokens, longest),
                Sampler.warmed(temperature, seed + number),
                ending(),
                partial(_note, chosen[number], heard, greedy=not temperature),
                watch=watched[number].append,
            )

    # Without a drafter: these are the plain model's texts either way, and several share a pass.
    plain, stats = NoDraft(aux_layers), GenerationStats()
    for index, row, cache in decode(backbone, plain, FixedLength(0), requests(), stats, together, spare.handed_out):
        number = numbers[index]
        hidden, answer, known = torch.cat(watched.pop(number)), begins.pop(number), prompted.pop(number)
        asked = torch.cat((known, best_of(backbone, hidden[len(known) : answer - 1])))  # [answer - 1]
        best = torch.cat((asked, asked.new_tensor(chosen.pop(number))))  # [n]
        with one_torch_thread():
            states, aux = parted(hidden.to(dtype), aux_layers)
            text = Features(row[:-1], states, best, kept_keys(cache, layers, dtype), answer, aux)
        spare.keep(_Begun(row[: answer - 1], hidden[: answer - 1].clone(), asked, cache))
        yield number, text


class _Failed(NamedTuple):
    error: BaseException


def _side_by_side(
    work: Callable[[Numbered], Iterator[Item]], prompts: Numbered, workers: int, stopped: threading.Event
) -> Iterator[Item]:
    """What `workers` threads make of `prompts`, as it comes; each takes the next prompt when it has room for one.

    Whoever stops asking stops them, by way of `stopped`.
    """
    made: SimpleQueue[Item | _Failed | None] = SimpleQueue()
    lock = threading.Lock()

    def mine() -> Numbered:
        while not stopped.is_set():
            with lock:
                found = next(prompts, None)
            if found is None:
                return
            yield found

    def run() -> None:
        torch.set_num_threads(1)  # of this thread
        try:
            for item in work(mine()):
                made.put(item)
                if stopped.is_set():
                    break
        except BaseException as error:
            made.put(_Failed(error))
        finally:
            made.put(None)

    threads, before = [threading.Thread(target=run, daemon=True) for _ in range(workers)], torch.get_num_threads()
    try:
        for thread in threads:
            thread.start()
        running = workers
        while running:
            item = made.get()
            if isinstance(item, _Failed):
                raise item.error
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)  # what threads that are to come begin with is the whole process's


class _Begun(NamedTuple):
    """What is known of the first n tokens of a text: `tokens` [n], `hidden` [n, width] as a pass gives it, `best` [n],
    and the cache that holds them."""

    tokens: Tensor
    hidden: Tensor
    best: Tensor
    cache: KVCache


class _Spare:
    """Caches of texts that have ended, for new ones: no memory to be had anew, and what both texts begin with is there.

    `width`: of a pass's rows. `handed_out` gives `decode` the cache that was last taken.
    """

    def __init__(self, backbone: Decoder, width: int) -> None:
        self._backbone, self._width = backbone, width
        self._kept, self._next = list[_Begun](), list[KVCache]()
        self.handed_out = Conversations(self._next.pop)

    def take(self, prompt: Tensor) -> _Begun:
        """As much of prompt [n] as is known, but never its last token, whose state chooses the first of the answer."""
        if len(self._kept) < _SPARE:
            backbone = self._backbone
            with one_torch_thread():  # many small ones
                cache = backbone.new_cache()
            hidden = torch.empty(0, self._width, dtype=backbone.dtype, device=backbone.device)
            known = _Begun(prompt[:0], hidden, torch.empty(0, dtype=torch.int64, device=backbone.device), cache)
        else:
            shared = [_shared(old, prompt[:-1]) for old in self._kept]
            most = max(shared)
            tokens, hidden, best, cache = self._kept.pop(shared.index(most))
            cache.rewind(most)
            known = _Begun(tokens[:most], hidden[:most], best[:most], cache)
        self._next.append(known.cache)
        return known

    def keep(self, text: _Begun) -> None:
        if text.cache.length <= _MODEST and text.cache.rewindable(0):
            self._kept = [*self._kept[-_SPARE:], text]


def _shared(text: _Begun, prompt: Tensor) -> int:
    """How many tokens `text` and prompt [n] begin with alike."""
    most = min(len(text.tokens), len(prompt))
    differs = (text.tokens[:most] != prompt[:most]).nonzero()
    return int(differs[0]) if len(differs) else most


def _note(chosen: list[int], heard: Callable[[int], None], verdict: Verdict, logits: Tensor, *, greedy: bool) -> None:
    """Of every token that was emitted, what would have been by greed; its logits are there, and need not come again."""
    chosen.extend(verdict.tokens if greedy else likeliest(logits))
    heard(len(verdict.tokens))
