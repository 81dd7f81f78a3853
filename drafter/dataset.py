"""A training set on disk: shards of `Features`, written as they are made and read back in a shuffled order.

A folder holds `set.json` (whose features these are) and shards: block 0 is `00000.safetensors`, followed by
`00000-1.safetensors` and so on where the block was written in pieces. A shard is written whole or not at all, so a set
whose making was killed goes on after its last shard. The order in which texts are read depends on the blocks, not on
their pieces. States are bfloat16: a token of SmolLM2 takes 2 KB. Reading holds one block at a time. Left out:
deduplication, compression.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
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
_SHARD = re.compile(r"\d+(-\d+)?\.safetensors")


@dataclass(frozen=True)
class Position:
    """Where a reader is: the next text to come is number `text` of block `shard` (in shuffled order) of `epoch`."""

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

    def add(self, texts: Sequence[Features], seconds: float = 0.0, going_on: bool = False) -> None:
        """Write one shard, which took `seconds` to make: a new block, or `going_on` with the last one.

        Raises OSError when the disk is full; the set is then as it was.
        """
        assert texts
        blocks = _blocks(self.shards)
        shard = f"{len(blocks) - 1:05d}-{len(blocks[-1])}" if going_on and blocks else f"{len(blocks):05d}"
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
        with replacing(self.folder / f"{shard}.safetensors") as temporary:
            save_file(tensors, temporary)


class Dataset:
    """Reads what a `DatasetWriter` wrote."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when there is no set in `folder`."""
        self.folder, self.about = folder, _about(folder)
        self.shards = _shards(folder)
        if not self.shards:
            raise ValueError(f"{folder}: the training set has no shards yet; let its making finish one")
        self.blocks = _blocks(self.shards)

    def texts(
        self, seed: int, start: Position = Position(), epochs: int | None = None
    ) -> Iterator[tuple[Position, Features]]:
        """Every text once an epoch, blocks and texts within them shuffled by `seed`; endless without `epochs`.

        Yields (where to go on after it, the text): started there, the same texts follow.
        """
        epoch, first_shard, first_text = start.epoch, start.shard, start.text
        while epochs is None or epoch < epochs:
            order = _order(len(self.blocks), seed, epoch, 0)
            for at in range(first_shard, len(order)):
                texts = [text for shard in self.blocks[order[at]] for text in read_shard(shard)]
                inner = _order(len(texts), seed, epoch, 1 + order[at])
                for i in range(first_text, len(inner)):
                    yield Position(epoch, at, i + 1), texts[inner[i]]
                first_text = 0
            first_shard, epoch = 0, epoch + 1


class Size(NamedTuple):
    """How large a set is: shards, tokens, of which `answered` the backbone wrote, seconds that it took, and texts."""

    shards: int = 0
    tokens: int = 0
    answered: int = 0
    seconds: float = 0.0
    texts: int = 0

    def and_shard(self, tokens: int, answered: int, seconds: float, texts: int) -> Size:
        return Size(
            self.shards + 1, self.tokens + tokens, self.answered + answered, self.seconds + seconds, self.texts + texts
        )


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
        found = found.and_shard(int(lengths.sum()), own, seconds, len(lengths))
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
    found = [path for path in folder.glob("[0-9]*.safetensors") if _SHARD.fullmatch(path.name)]
    return sorted(found, key=_place)


def _blocks(shards: Sequence[Path]) -> list[list[Path]]:
    """The shards of each block, in order."""
    return [list(pieces) for _, pieces in groupby(shards, lambda path: _place(path)[0])]


def _place(shard: Path) -> tuple[int, int]:
    """The number of a shard's block, and its own in that."""
    block, _, piece = shard.stem.partition("-")
    return int(block), int(piece or 0)


def _about(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no training set here ({error})") from error
