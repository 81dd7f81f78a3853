"""Texts decoded by an engine of their own, and by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.cache import CacheProvider, KVCache
from specdec.drafting.protocol import Drafter, DraftLength, FixedLength, NoDraft
from specdec.engine.engine import Engine
from specdec.engine.event import Event
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.model.decoder import Decoder
from specdec.model.states import States
from tests.support.tiny import prompt

SPECULATIVE: dict[str, Any] = {"custom_generate": specdec.speculative, "drafter": "suffix"}
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


class Ended(NamedTuple):
    number: int
    row: Tensor
    cache: KVCache


def never(tokens: Tensor, choice: Choice) -> bool:
    """A `stop` that ends no text."""
    return False


def request(ids: Tensor, new: int, seed: int | None = None) -> Request:
    """A request for `new` tokens after prompt [n]."""
    return Request(ids, len(ids) + new, Sampler(seed=seed), never)


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


def alone(decoder: Decoder, one: Request) -> list[int]:
    """The text of a request that nobody is beside, plainly decoded."""
    ((_, row, _),) = decode(decoder, NoDraft(), FixedLength(0), [one])
    return row.tolist()


def to_end(engine: Engine) -> None:
    while engine.in_flight:
        engine.step()


def counted(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every pass, as passes come."""
    rows: list[int] = []
    forward = decoder.forward_many

    def counting(ids: list[Tensor], *arguments: object) -> States:
        rows.append(sum(map(len, ids)))
        return forward(ids, *arguments)

    monkeypatch.setattr(decoder, "forward_many", counting)
    return rows


def generated(model: PreTrainedModel, **more: Any) -> list[int]:
    return model.generate(prompt(12), **GREEDY, **more)[0].tolist()  # type: ignore[no-any-return]
