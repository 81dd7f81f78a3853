"""A training set on disk: shards of `Features`, written as they are made and read back in a shuffled order.

A folder holds `set.json` (whose features these are) and shards `00000.safetensors`, `00001.safetensors`, ... A shard
is written whole or not at all, so a set whose making was killed goes on after its last shard (`DatasetWriter.done`).
States are bfloat16: a token of SmolLM2 takes 2 KB. Reading holds one shard at a time. Left out: deduplication,
compression.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.features import Features
from drafter.network import Keys
from specdec.atomic import replacing
from specdec.sampling import mix

ABOUT = "set.json"


@dataclass(frozen=True)
class Position:
    """Where a reader is: the next text to come is number `text` of shard `shard` (in shuffled order) of `epoch`."""

    epoch: int = 0
    shard: int = 0
    text: int = 0


BEGINNING = Position()


class DatasetWriter:
    """Adds shards to `folder`. `about` says what the set is made from; a folder with another answer is refused."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Raises ValueError when the folder holds a set of something else."""
        self.folder = folder
        if (folder / ABOUT).is_file():
            if (found := _about(folder)) != about:
                changed = sorted(key for key in {*found, *about} if found.get(key) != about.get(key))
                raise ValueError(
                    f"{folder}: holds a training set with other settings ({', '.join(changed)}); name another folder, "
                    "or delete it"
                )
        else:
            with replacing(folder / ABOUT) as temporary:
                temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @property
    def shards(self) -> list[Path]:
        """The shards that are there, in order."""
        return _shards(self.folder)

    @property
    def done(self) -> int:
        """How many shards are there."""
        return len(self.shards)

    def add(self, texts: Sequence[Features], seconds: float = 0.0) -> None:
        """Write one shard, which took `seconds` to make. Raises OSError when the disk is full; the set is then as it
        was."""
        assert texts
        tensors = {
            "seconds": torch.tensor(seconds, dtype=torch.float64),
            "lengths": torch.tensor([len(text) for text in texts], dtype=torch.int64),
            "answers": torch.tensor([text.answer for text in texts], dtype=torch.int64),
            "tokens": torch.cat([text.tokens for text in texts]).int(),
            "best": torch.cat([text.best for text in texts]).int(),
            "hidden": torch.cat([text.hidden for text in texts]),
        }
        for layer in texts[0].keys:
            for i, name in enumerate(Keys._fields):
                tensors[f"{layer}.{name}"] = torch.cat([text.keys[layer][i] for text in texts], dim=1)
        for layer in texts[0].aux:
            tensors[f"{layer}.out"] = torch.cat([text.aux[layer] for text in texts])
        with replacing(self.folder / f"{self.done:05d}.safetensors") as temporary:
            save_file(tensors, temporary)


class Dataset:
    """Reads what a `DatasetWriter` wrote."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when there is no set in `folder`."""
        self.folder, self.about = folder, _about(folder)
        self.shards = _shards(folder)
        if not self.shards:
            raise ValueError(f"{folder}: the training set has no shards yet; let its making finish one")

    def texts(
        self, seed: int, start: Position = Position(), epochs: int | None = None
    ) -> Iterator[tuple[Position, Features]]:
        """Every text once an epoch, shards and texts within them shuffled by `seed`; endless without `epochs`.

        Yields (where to go on after it, the text): started there, the same texts follow.
        """
        epoch, first_shard, first_text = start.epoch, start.shard, start.text
        while epochs is None or epoch < epochs:
            order = _order(len(self.shards), seed, epoch, 0)
            for at in range(first_shard, len(order)):
                texts = read_shard(self.shards[order[at]])
                inner = _order(len(texts), seed, epoch, 1 + order[at])
                for i in range(first_text, len(inner)):
                    yield Position(epoch, at, i + 1), texts[inner[i]]
                first_text = 0
            first_shard, epoch = 0, epoch + 1


class Size(NamedTuple):
    """How large a set is: shards, tokens in them, of which `answered` the backbone wrote, and seconds that it took."""

    shards: int = 0
    tokens: int = 0
    answered: int = 0
    seconds: float = 0.0


def size(shards: Sequence[Path]) -> Size:
    """Of the set in `shards`. Raises ValueError when one is damaged."""
    found = Size()
    for path in shards:
        try:
            with safe_open(path, "pt") as stored:
                lengths, answers = stored.get_tensor("lengths"), stored.get_tensor("answers")
                seconds = float(stored.get_tensor("seconds"))
        except Exception as error:  # safetensors has errors of its own
            raise _damaged(path, error) from error
        own = int((lengths - answers).sum())
        found = Size(found.shards + 1, found.tokens + int(lengths.sum()), found.answered + own, found.seconds + seconds)
    return found


def frequent(dataset: Dataset, vocab: int, count: int, wanted: Tensor | None = None) -> tuple[Tensor, float]:
    """The `count` tokens out of `vocab` that the backbone chose most often, ids [count] ascending, and their share of
    all that it chose. `wanted`: the tokens, where they are given."""
    seen = torch.zeros(vocab, dtype=torch.int64)
    for shard in dataset.shards:
        with safe_open(shard, "pt") as stored:
            seen += torch.bincount(stored.get_tensor("best"), minlength=vocab)
    most = seen.argsort(descending=True, stable=True)[:count] if wanted is None else wanted
    return most.sort().values, float(seen[most].sum() / seen.sum())


def read_shard(path: Path) -> list[Features]:
    """The texts of a shard, in the order in which they were added. Raises ValueError when it is damaged."""
    try:
        stored = load_file(path)
        lengths, answers = stored["lengths"].tolist(), stored["answers"].tolist()
        layers = [int(name.removesuffix(".k")) for name in stored if name.endswith(".k")]
        aux = [name for name in stored if name.endswith(".out")]
        parts: dict[str, Sequence[Tensor]] = {
            name: torch.split(stored[name], lengths) for name in ("tokens", "best", "hidden", *aux)
        }
        parts |= {f"{i}.{n}": torch.split(stored[f"{i}.{n}"], lengths, dim=1) for i in layers for n in Keys._fields}
    except Exception as error:  # safetensors has errors of its own
        raise _damaged(path, error) from error
    return [
        Features(
            parts["tokens"][i].long(),
            parts["hidden"][i],
            parts["best"][i].long(),
            {at: Keys(parts[f"{at}.k"][i], parts[f"{at}.v"][i]) for at in layers},
            answer,
            {int(name.removesuffix(".out")): parts[name][i] for name in aux},
        )
        for i, answer in enumerate(answers)
    ]


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: a damaged shard ({error}); delete it and those after it, and they are made again")


def _order(count: int, *seeds: int) -> list[int]:
    key = 0
    for seed in seeds:
        key = mix(key ^ seed)
    generator = torch.Generator().manual_seed(key >> 1)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"))


def _about(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no training set here ({error})") from error
