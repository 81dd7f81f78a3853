"""Making a training set: prompts answered by the backbone, and texts read as they are, shard by shard.

Block s holds the texts s * PER_SHARD and on, in the order of their prompts, whatever the order in which the answers
ended. Every answer depends on its prompt's number alone: a set whose making was stopped, and that grew later, is the
set of an uninterrupted run. A block is written when it is full, or in pieces, as time goes by. A limit of time shows in
the texts only at its end: the texts that are under way then end where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from drafter.data.answering import generate_answers
from drafter.data.dataset import DatasetWriter, Size, size
from drafter.data.features import Features
from drafter.data.given import EncodedPrompt, GivenText, GivenTexts, read_given
from drafter.data.mixture import Item, Mixture, answer_and_read
from drafter.data.patience import PATIENT, USUAL, Intervals, Patience
from drafter.prompts.files import TrainingPrompt
from drafter.prompts.generator import document_prompts, generated_prompts, mix_prompts, user_prompts
from drafter.settings import Answering
from specdec.model.decoder import Decoder

BUILT_IN = "builtin"
TOO_LONG = 5000  # prompts in a row; the built-in generator has no end, and would be asked for ever
PER_SHARD = 128  # prompts; SmolLM2's blocks are some 80 MB
HELD_OUT = 24  # prompts that begin every stream, and are kept for evaluation

Encode = Callable[[TrainingPrompt], Tensor]


def training_prompts(sources: Iterable[tuple[str, float]], seed: int) -> Iterator[TrainingPrompt]:
    """Yield the prompts of `sources`, (name, weight): "builtin", a .jsonl file of prompts, a text file, a folder of
    them.

    Raises:
        ValueError: nothing is at a name, or a file holds no prompts.
    """
    parts: list[tuple[float, Iterator[TrainingPrompt]]] = []
    for name, weight in sources:
        if name == BUILT_IN:
            parts.append((weight, generated_prompts(seed)))
        elif name.endswith(".jsonl"):
            parts.append((weight, user_prompts(Path(name))))
        else:
            parts.append((weight, document_prompts(Path(name), seed)))
    return mix_prompts(parts, seed)


def encode_prompts(prompts: Iterable[TrainingPrompt], encode: Encode, most: int) -> Iterator[EncodedPrompt]:
    """Yield the prompts that have at most `most` tokens, with their token ids [n].

    `prompts` may be without end. After `TOO_LONG` prompts in a row that are longer, the iterator ends.
    """
    refused = 0
    for prompt in prompts:
        ids = encode(prompt)
        if 0 < len(ids) <= most:
            refused = 0
            yield EncodedPrompt(prompt, ids)
        elif (refused := refused + 1) == TOO_LONG:
            return


class Collector:
    """Grow the training set in `folder` with answers to `prompts`, for heads that read the K/V of the backbone's
    `layers` and fuse the outputs of its `aux_layers`.

    `prompts`: token ids [n], always the same prompts from the first on, of which the `held_out` first ones (None:
    `HELD_OUT`) are kept for evaluation; behind those there may be texts that are read as they are. `given`: where all
    texts come from instead.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Decoder,
        layers: Sequence[int],
        prompts: Iterator[Item],
        eos_ids: frozenset[int],
        answering: Answering,
        about: dict[str, Any],
        aux_layers: Sequence[int] = (),
        given: GivenTexts | None = None,
        held_out: int | None = None,
    ) -> None:
        """Begin the set in `folder`, or go on with it.

        Raises:
            ValueError: `folder` holds a set that was made in another way.
        """
        how = {k: v for k, v in asdict(answering).items() if k != "max_batch"}
        how["temperatures"] = list(answering.temperatures)  # as JSON gives it back
        about = {**about, "backbone": backbone.fingerprint, "layers": list(layers), "answering": how}
        if aux_layers:
            about["aux_layers"] = list(aux_layers)
        if (adapter := backbone.adapters.of(backbone.adapters.default)) is not None:
            about["adapter"] = adapter.identity
        self.writer = DatasetWriter(folder, about)
        self.backbone, self.layers, self.eos_ids, self.answering = backbone, layers, eos_ids, answering
        self.aux_layers, self._given = tuple(aux_layers), given
        self.held_out = [
            found
            for found in islice(prompts, HELD_OUT if held_out is None else held_out)
            if not isinstance(found, GivenText)
        ]
        self._prompts = prompts
        self._counting = Lock()
        self.fresh = 0  # tokens answered since `grow` began, those of texts under way too

    def size(self) -> Size:
        """Count what there is of the set."""
        return size(self.writer.shards)

    def grow(
        self, patience: Patience = PATIENT, intervals: Intervals = USUAL, max_batch: int | None = None
    ) -> Iterator[Size]:
        """Make shard after shard, until the prompts are used up or `patience` is over; yield the set's size after each
        shard.

        A shard is closed when its block is full, or after its interval. `max_batch`: texts in a pass, if not as many as
        the settings say. A caller that stops the iterator loses only the answers that are not in a shard yet.
        """
        found, now = self.size(), patience.now
        texts = self._texts(found.texts, patience, max_batch)
        waiting: dict[int, Features] = {}
        closed = now()
        for number, text in texts:
            waiting[number] = text
            while ready := self._ready(waiting, found.texts):
                full = (found.texts + len(ready)) % PER_SHARD == 0
                if not full and now() - closed < (intervals.shard if found.shards else intervals.first_shard):
                    break
                found, closed = self._add(found, ready, waiting, now() - closed), now()
                yield found
        while ready := self._ready(waiting, found.texts):  # the prompts are used up, or the time is
            found, closed = self._add(found, ready, waiting, now() - closed), now()
            yield found

    def _texts(self, first: int, patience: Patience, max_batch: int | None) -> Iterator[tuple[int, Features]]:
        """Return the texts from number `first` on, with their numbers, in the order in which they are made."""
        how = self.answering
        read = partial(
            read_given,
            self.backbone,
            layers=self.layers,
            aux_layers=self.aux_layers,
            workers=self._workers(),
            on_tokens=self._count_tokens,
        )
        if self._given is not None:
            return read(self._given(first, patience))
        mixture = Mixture(self._prompts, first, patience)
        answers = generate_answers(
            self.backbone,
            mixture.prompts(),
            layers=self.layers,
            aux_layers=self.aux_layers,
            max_new_tokens=how.max_new_tokens,
            eos_ids=self.eos_ids,
            temperatures=how.temperatures,
            seed=how.seed,
            first=mixture.asked_before,
            max_batch=how.max_batch if max_batch is None else max_batch,
            workers=self._workers(),
            patience=patience,
            on_tokens=self._count_tokens,
        )
        return answer_and_read(mixture, answers, read)

    @staticmethod
    def _ready(waiting: Mapping[int, Features], first: int) -> list[int]:
        """Return the numbers of the texts of `waiting` from `first` on without a gap, up to the end of its block."""
        return list(takewhile(waiting.__contains__, range(first, first - first % PER_SHARD + PER_SHARD)))

    def _add(self, found: Size, ready: Sequence[int], waiting: dict[int, Features], seconds: float) -> Size:
        """Write the texts with the numbers `ready` as a shard; they wait no longer, or a long run would fill memory."""
        texts = [waiting.pop(number) for number in ready]
        self.writer.add(texts, seconds, going_on=found.texts % PER_SHARD > 0)
        tokens, own = sum(map(len, texts)), sum(len(text) - text.answer for text in texts)
        return found.and_shard(tokens, own, seconds, len(texts))

    def whole_blocks(self, found: Size) -> bool:
        """Tell whether a set of size `found` ends where a block does."""
        return found.texts % PER_SHARD == 0

    def _count_tokens(self, tokens: int) -> None:
        with self._counting:
            self.fresh += tokens

    def _workers(self) -> int:
        """Return how many threads answer: one for each that torch would use. On a GPU one pass is enough."""
        return torch.get_num_threads() if self.backbone.device.type == "cpu" else 1

    def held_out_texts(self, count: int, patience: Patience = PATIENT) -> list[Features]:
        """Return the backbone's answers, at the first temperature, to the first `count` prompts kept for evaluation."""
        how = self.answering
        texts = generate_answers(
            self.backbone,
            self.held_out[:count],
            layers=self.layers,
            aux_layers=self.aux_layers,
            max_new_tokens=how.max_new_tokens,
            eos_ids=self.eos_ids,
            temperatures=how.temperatures[:1],
            seed=how.seed,
            max_batch=how.max_batch,
            workers=self._workers(),
            dtype=torch.float32,
            patience=patience,
        )
        return [text for _, text in sorted(texts, key=lambda found: found[0])]
