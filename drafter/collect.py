"""Making a training set: prompts answered by the backbone, shard by shard.

Shard s holds the prompts s * PER_SHARD and on, in their order, whatever the order in which their answers ended, and
every answer depends on its prompt's number alone: a set whose making was stopped, and that grew later, is the set of an
uninterrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafter.answering import answered
from drafter.dataset import DatasetWriter, Size, size
from drafter.features import Features
from drafter.prompts import TrainingPrompt, document_prompts, generated_prompts, mixed, user_prompts
from specdec.model.decoder import Decoder

BUILT_IN = "builtin"
PER_SHARD = 128  # prompts; SmolLM2's shards are some 80 MB, and what a kill loses is under a minute
HELD_OUT = 24  # prompts that begin every stream, and are kept for evaluation

Encode = Callable[[TrainingPrompt], Tensor]


@dataclass(frozen=True)
class Answering:
    """How prompts become texts.

    `temperatures` are taken in turn by the number of the prompt. `together`: texts in a pass; it never changes a word.
    """

    max_new_tokens: int = 200
    max_prompt: int = 640  # tokens; longer prompts are left out
    temperatures: tuple[float, ...] = (0.0,)
    seed: int = 0
    together: int = 48


def training_prompts(sources: Iterable[tuple[str, float]], seed: int) -> Iterator[TrainingPrompt]:
    """The prompts of `sources`, (name, weight): "builtin", a .jsonl file of prompts, a text file, a folder of them.

    Raises ValueError: nothing is at a name, or it holds no prompts.
    """
    parts: list[tuple[float, Iterator[TrainingPrompt]]] = []
    for name, weight in sources:
        if name == BUILT_IN:
            parts.append((weight, generated_prompts(seed)))
        elif name.endswith(".jsonl"):
            parts.append((weight, user_prompts(Path(name))))
        else:
            parts.append((weight, document_prompts(Path(name), seed)))
    return mixed(parts, seed)


def fitting(prompts: Iterable[TrainingPrompt], encode: Encode, most: int) -> Iterator[Tensor]:
    """The token ids [n] of the prompts that have at most `most` of them."""
    for prompt in prompts:
        ids = encode(prompt)
        if 0 < len(ids) <= most:
            yield ids


class Collector:
    """Grows the set in `folder` with answers to `prompts` (token ids [n], always the same ones from the first on), for
    heads that read the K/V of the backbone's `layers` and fuse the outputs of its `aux_layers`."""

    def __init__(
        self,
        folder: Path,
        backbone: Decoder,
        layers: Sequence[int],
        prompts: Iterator[Tensor],
        ends: frozenset[int],
        answering: Answering,
        about: dict[str, Any],
        aux_layers: Sequence[int] = (),
    ) -> None:
        """Raises ValueError when `folder` holds a set that was made in another way."""
        how = {k: v for k, v in asdict(answering).items() if k != "together"}
        how["temperatures"] = list(answering.temperatures)  # as JSON gives it back
        about = {**about, "backbone": backbone.fingerprint, "layers": list(layers), "answering": how}
        if aux_layers:
            about["aux_layers"] = list(aux_layers)
        self.writer = DatasetWriter(folder, about)
        self.backbone, self.layers, self.ends, self.answering = backbone, layers, ends, answering
        self.aux_layers = tuple(aux_layers)
        self.held_out = list(islice(prompts, HELD_OUT))
        self._prompts = prompts

    def size(self) -> Size:
        """What there is of the set."""
        return size(self.writer.shards)

    def grow(self) -> Iterator[Size]:
        """Makes shard after shard, endlessly or until the prompts are used up; yields the set's size after each.

        Whoever stops asking loses the answers of the shards that were not finished, and nothing else.
        """
        found = self.size()
        first, how = found.shards * PER_SHARD, self.answering
        texts = answered(
            self.backbone,
            islice(self._prompts, first, None),
            layers=self.layers,
            aux_layers=self.aux_layers,
            max_new_tokens=how.max_new_tokens,
            ends=self.ends,
            temperatures=how.temperatures,
            seed=how.seed,
            first=first,
            together=how.together,
            workers=_workers(self.backbone),
        )
        waiting: dict[int, dict[int, Features]] = {}
        began = time.monotonic()
        for number, text in texts:
            waiting.setdefault(number // PER_SHARD, {})[number] = text
            while len(waiting.get(found.shards, ())) == PER_SHARD:
                found = self._add(found, waiting.pop(found.shards), time.monotonic() - began)
                began = time.monotonic()
                yield found
        if found.shards in waiting:  # the prompts are used up
            yield self._add(found, waiting.pop(found.shards), time.monotonic() - began)

    def _add(self, found: Size, shard: dict[int, Features], seconds: float) -> Size:
        texts = [shard[number] for number in sorted(shard)]
        self.writer.add(texts, seconds)
        tokens, own = sum(map(len, texts)), sum(len(text) - text.answer for text in texts)
        return Size(found.shards + 1, found.tokens + tokens, found.answered + own, found.seconds + seconds)


def held_out_texts(collector: Collector) -> list[Features]:
    """The backbone's answers, at the first temperature, to the prompts that are kept for evaluation."""
    how = collector.answering
    texts = answered(
        collector.backbone,
        collector.held_out,
        layers=collector.layers,
        aux_layers=collector.aux_layers,
        max_new_tokens=how.max_new_tokens,
        ends=collector.ends,
        temperatures=how.temperatures[:1],
        seed=how.seed,
        together=how.together,
        workers=_workers(collector.backbone),
        dtype=torch.float32,
    )
    return [text for _, text in sorted(texts, key=lambda found: found[0])]


def _workers(backbone: Decoder) -> int:
    """Threads to answer with: one for each that torch would use. On a GPU one pass is enough."""
    return torch.get_num_threads() if backbone.device.type == "cpu" else 1
