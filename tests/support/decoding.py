"""Texts decoded by an engine of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from specdec.cache import CacheProvider, KVCache
from specdec.drafting.draft_length import DraftLength
from specdec.drafting.protocol import Drafter
from specdec.engine.engine import Engine, Event
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.model.decoder import Decoder


class Ended(NamedTuple):
    number: int
    row: Tensor
    cache: KVCache


def never(tokens: Tensor, choice: Choice) -> bool:
    """A `stop` that ends no text."""
    return False


def request(prompt: Tensor, new: int, seed: int | None = None) -> Request:
    """A request for `new` tokens after prompt [n]."""
    return Request(prompt, len(prompt) + new, Sampler(seed=seed), never)


def decode(
    decoder: Decoder,
    drafter: Drafter,
    lengths: DraftLength,
    requests: Iterable[Request],
    stats: GenerationStats | None = None,
    max_batch: int = 1,
    caches: CacheProvider | None = None,
    on_event: Callable[[int, Event], None] = lambda number, event: None,
) -> Iterator[Ended]:
    """Each of `requests`, with its number, when it has ended; `on_event` is told what every pass does for it."""
    engine = Engine(decoder, drafter, lengths, caches, max_batch, stats)
    numbers: dict[Request, int] = {}

    def numbered() -> Iterator[Request]:
        for one in requests:
            numbers[one] = len(numbers)
            yield one

    for event in engine.run(numbered()):
        number = numbers[event.sequence.request]
        on_event(number, event)
        if event.sequence.ended:
            yield Ended(number, event.sequence.row.clone(), event.sequence.conversation.cache)
