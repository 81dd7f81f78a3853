"""A training set on disk: shards of `Features`, written as they are made and read back in a shuffled order.

A folder holds `set.json` (backbone and settings of the set) and shards: block 0 is `00000.safetensors`, followed by
`00000-1.safetensors` and so on where the block was written in pieces. A shard is written whole or not at all, so a set
whose making was killed goes on after its last shard. The order in which texts are read depends on the blocks, not on
their pieces. States are bfloat16: a token of SmolLM2 takes 2 KB. Reading holds one block at a time. Left out:
deduplication, compression.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafter.data.features import AttentionStates, Features
from specdec.engine.sampling import mix
from specdec.util.atomic import replacing
from specdec.weights.metadata import Values, foreign, quote, read_object

ABOUT = "set.json"
_SHARD = re.compile(r"\d+(-\d+)?\.safetensors")


@dataclass(frozen=True)
class Position:
    """Say where a reader is: the next text to come is number `text` of block `shard` (in shuffled order) of `epoch`."""

    epoch: int = 0
    shard: int = 0
    text: int = 0


BEGINNING = Position()


class DatasetWriter:
    """Add shards to `folder`; `about` says what the set is made from."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Begin the set in `folder`, or go on with it.

        Raises:
            ValueError: the folder holds a set with another `about`.
        """
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
        """Return the shards that are in the folder, in order."""
        return _shards(self.folder)

    def add(self, texts: Sequence[Features], seconds: float = 0.0, going_on: bool = False) -> None:
        """Write one shard, which took `seconds` to make: a new block, or `going_on` with the last block.

        Raises:
            OSError: the disk is full; the set is then as it was.
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
            for i, name in enumerate(AttentionStates._fields):
                tensors[f"{layer}.{name}"] = torch.cat([text.keys[layer][i] for text in texts], dim=1)
        for layer in texts[0].aux:
            tensors[f"{layer}.out"] = torch.cat([text.aux[layer] for text in texts])
        with replacing(self.folder / f"{shard}.safetensors") as temporary:
            save_file(tensors, temporary)


class Dataset:
    """Read the set that a `DatasetWriter` wrote."""

    def __init__(self, folder: Path) -> None:
        """Open the set in `folder`.

        Raises:
            ValueError: there is no set in `folder`, or a set without shards.
        """
        self.folder, self.about = folder, _about(folder)
        self.shards = _shards(folder)
        if not self.shards:
            raise ValueError(f"{folder}: the training set has no shards yet; let its making finish one")
        self.blocks = _blocks(self.shards)

    def texts(
        self, seed: int, start: Position = Position(), epochs: int | None = None
    ) -> Iterator[tuple[Position, Features]]:
        """Yield every text once an epoch, blocks and texts within them shuffled by `seed`; endless without `epochs`.

        Each item is (position after the text, the text): reading that starts at that position yields the texts that
        follow.
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
    """Count a set: its shards, its texts, its tokens, those of the tokens that are not a prompt's (`answered`), and its
    seconds."""

    shards: int = 0
    tokens: int = 0
    answered: int = 0
    seconds: float = 0.0
    texts: int = 0

    def and_shard(self, tokens: int, answered: int, seconds: float, texts: int) -> Size:
        """Return the size of the set with one more shard, of so many tokens, answered tokens, seconds and texts."""
        return Size(
            self.shards + 1, self.tokens + tokens, self.answered + answered, self.seconds + seconds, self.texts + texts
        )


def size(shards: Sequence[Path]) -> Size:
    """Count the set in `shards`.

    Raises:
        ValueError: a shard is damaged.
    """
    found = Size()
    for path in shards:
        with _reading(path) as stored:
            lengths, answers = _lengths(stored)
            seconds = Values({"seconds": float(stored.get_tensor("seconds"))}).number("seconds", 0, 1e12)
        found = found.and_shard(sum(lengths), sum(lengths) - sum(answers), seconds, len(lengths))
    return found


def frequent(dataset: Dataset, vocab: int, count: int, wanted: Tensor | None = None) -> tuple[Tensor, float]:
    """Return the `count` tokens out of `vocab` that the backbone chose most often, and their share of all choices.

    The ids [count] are ascending. `wanted`: the tokens, where they are given. The choices are counted with the tokens
    of the texts; every token of the set is looked at.

    Raises:
        ValueError: a shard is damaged, or has a token that is not in the vocabulary.
    """
    seen = torch.zeros(vocab, dtype=torch.int64)
    for shard in dataset.shards:
        with _reading(shard) as stored:
            for name in ("tokens", "best"):
                ids = stored.get_tensor(name)
                if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab:
                    raise ValueError(f"{name} are not all in a vocabulary of {vocab}")
            seen += torch.bincount(ids, minlength=vocab)
    most = seen.argsort(descending=True, stable=True)[:count] if wanted is None else wanted
    return most.sort().values, int(seen[most].sum()) / int(seen.sum())


def read_shard(path: Path) -> list[Features]:
    """Return the texts of a shard, in the order in which they were added.

    Raises:
        ValueError: the shard is damaged.
    """
    with _reading(path) as stored:
        lengths, answers = _lengths(stored)
        total = sum(lengths)
        names = _by_layer(stored.keys())
        parts: dict[str, Sequence[Tensor]] = {}
        for name in ("tokens", "best"):
            parts[name] = _split(stored, name, torch.int32, (total,), lengths)
        width = _columns(stored, "hidden")
        for name in ("hidden", *names["out"].values()):
            parts[name] = _split(stored, name, None, (total, width), lengths)
        for layer, name in names["k"].items():
            shape = stored.get_slice(name).get_shape()
            heads, size = (shape[0], shape[2]) if len(shape) == 3 else (0, 0)
            for field in AttentionStates._fields:
                parts[f"{layer}.{field}"] = _split(stored, f"{layer}.{field}", None, (heads, total, size), lengths)
    return [
        Features(
            parts["tokens"][i].long(),
            parts["hidden"][i],
            parts["best"][i].long(),
            {at: AttentionStates(parts[f"{at}.k"][i], parts[f"{at}.v"][i]) for at in names["k"]},
            answer,
            {at: parts[name][i] for at, name in names["out"].items()},
        )
        for i, answer in enumerate(answers)
    ]


def _lengths(stored: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of every text, and where its answer begins. A damaged file may hold any numbers: they are
    checked against the tokens."""
    (total,) = stored.get_slice("tokens").get_shape()
    values = Values({name: stored.get_tensor(name).tolist() for name in ("lengths", "answers")})
    lengths = values.wholes("lengths", 1, total)
    answers = values.wholes("answers", 0, total, length=len(lengths))
    if sum(lengths) != total or not lengths or any(a > n for a, n in zip(answers, lengths, strict=True)):
        raise ValueError(f"{len(lengths)} texts of {sum(lengths)} tokens, answers included; it holds {total}")
    return lengths, answers


def _by_layer(names: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return the names of K ("k") and of outputs ("out") by layer."""
    found: dict[str, dict[int, str]] = {"k": {}, "out": {}}
    for name in names:
        layer, _, kind = name.partition(".")
        if kind in found:
            if not (layer.isascii() and layer.isdecimal() and len(layer) < 6):
                raise ValueError(f"{quote(name)} is of no layer")
            found[kind][int(layer)] = name
    return found


def _columns(stored: Any, name: str) -> int:
    shape = stored.get_slice(name).get_shape()
    return int(shape[1]) if len(shape) == 2 else 0


def _split(
    stored: Any, name: str, dtype: torch.dtype | None, shape: tuple[int, ...], lengths: list[int]
) -> Sequence[Tensor]:
    """Return the tensor `name`, of `dtype` (None: any float) and `shape`, in a piece for each text."""
    found = tuple(stored.get_slice(name).get_shape())
    if found != shape or 0 in shape:
        raise ValueError(f"{name} is {list(found)} where {list(shape)} is due")
    tensor: Tensor = stored.get_tensor(name)
    if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}")
    return torch.split(tensor, lengths, dim=1 if len(shape) == 3 else 0)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open the tensors of a shard; raise a ValueError that names the file for all that is wrong with them."""
    advice = "delete it and those after it, and they are made again"
    with foreign(path, advice, "a damaged shard"), safe_open(path, "pt") as stored:
        yield stored


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
    """Return the shards of each block, in order."""
    return [list(pieces) for _, pieces in groupby(shards, lambda path: _place(path)[0])]


def _place(shard: Path) -> tuple[int, int]:
    """Return the number of a shard's block, and the shard's number in the block."""
    block, _, piece = shard.stem.partition("-")
    return int(block), int(piece or 0)


def _about(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / ABOUT)
    except ValueError as error:
        raise ValueError(f"{folder}: no training set here ({error})") from error
