"""Texts whose tokens are given: a server's answers, chats, documents.

The backbone reads them, which takes a fraction of the time that it needs to write as many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from drafter.data.features import Features, read
from drafter.data.patience import Patience
from drafter.data.workers import in_workers
from drafter.prompts.files import TrainingPrompt
from specdec.model.decoder import Decoder


class EncodedPrompt(NamedTuple):
    """Keep a prompt with its token ids [n] int64."""

    prompt: TrainingPrompt
    ids: Tensor


class GivenText(NamedTuple):
    """Keep a text, `tokens` [n] int64, whose answer begins at token `answer`; n where it has none, and 1 in a document,
    which is not preceded by a prompt."""

    tokens: Tensor
    answer: int


GivenTexts = Callable[[int, Patience], Iterator[tuple[int, GivenText]]]
"""(number of the first text, when to stop) -> the texts from that one on, with their numbers, in any order."""


def read_given(
    backbone: Decoder,
    texts: Iterator[tuple[int, GivenText]],
    *,
    layers: Sequence[int],
    aux_layers: Sequence[int] = (),
    workers: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, Features]]:
    """Run `texts` through the backbone; yield (number of the text, its features) in the order in which they are read.

    `workers`: threads that share the texts, each on a core of its own. `on_tokens` is told the tokens of each text, by
    any worker. Features are those that `generate_answers` keeps of the same text: those of all tokens but the last one.
    """

    def work(mine: Iterator[tuple[int, GivenText]]) -> Iterator[tuple[int, Features]]:
        for number, text in mine:
            tokens = text.tokens[:-1] if len(text.tokens) > 1 else text.tokens
            (found,) = read(backbone, [tokens], layers, dtype, aux_layers)
            on_tokens(len(text.tokens))
            yield number, replace(found, answer=min(text.answer, len(found)))

    return in_workers(work, texts, workers, threading.Event())
