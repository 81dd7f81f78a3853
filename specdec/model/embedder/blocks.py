"""Where the media of a batch stand: each run of soft tokens in a prompt gets the picture, frame or clip that it is for.

What: `media_blocks` gives each row of a batch its blocks. Media go in order of appearance, kind by kind, through all
rows. Why strict: a count that does not fit would shift every later picture to another place without an error. Left out:
embedding; a prompt whose cache has its media already needs no rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.model.embedder.embedder import MediaEmbedder
from specdec.model.embedder.inputs import MediaInputs, Medium, clips, frames, hash_of, no_embedder, pictures
from specdec.model.embedder.spec import MediaTokens
from specdec.model.media import MediaBlock

_SAME_CALL = "hand over the prompts and the media that one call of the processor made"


class _Kind(NamedTuple):
    """Describe a kind of media: its soft token, the token before a run of it, the argument that brings it, a word for
    messages; `whole`: its rows see each other."""

    token: int | None
    begin: int | None
    argument: str
    one: str
    whole: bool


def media_blocks(
    ids: Tensor, mask: Tensor | None, inputs: MediaInputs, embedder: MediaEmbedder | None
) -> list[tuple[MediaBlock, ...]]:
    """Return the blocks of each row of ids [rows, n], at positions that count the tokens that mask [rows, n] keeps.

    `embedder` None: the model reads text alone.

    Raises:
        ValueError: media for a model that has no embedder for them, media and soft tokens that differ in number, shapes
            that do not fit, positions outside of the embedder's table.
    """
    if embedder is None:
        if (name := inputs.given) is not None:
            raise ValueError(no_embedder(name))
        return [()] * len(ids)
    ids = ids.cpu()
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    _check_types(ids, inputs.mm_token_type_ids, embedder.spec.tokens)
    blocks: list[list[MediaBlock]] = [[] for _ in ids]
    for kind, media in _kinds(inputs, embedder):
        runs = _runs(ids, kind.token)
        if media is None:
            _refuse_placeholders(ids, runs, kind)
            continue
        for row, start, end in runs:
            medium, inside = media.take(end - start), keep[row, start:end]
            if not bool(inside.any()):
                continue  # the whole medium is masked
            if not bool(inside.all()):
                raise ValueError(f"attention_mask hides a part of {kind.one} in row {row}: mask all of it, or nothing")
            at = int(keep[row, :start].sum())
            blocks[row].append(MediaBlock(at, at + medium.tokens, medium.key, kind.whole, medium.rows))
        media.check_taken()
    return [tuple(sorted(row, key=lambda block: block.start)) for row in blocks]


def _kinds(inputs: MediaInputs, embedder: MediaEmbedder) -> Iterator[tuple[_Kind, _Media | _Embedded | None]]:
    """Yield each kind of media with those that are given, None where none are."""
    tokens, done = embedder.spec.tokens, inputs.mm_encoder_outputs or {}
    for name, kind, read in (
        ("image", _Kind(tokens.image, tokens.image_begin, "pixel_values", "a picture", True), pictures),
        ("video", _Kind(tokens.video, tokens.image_begin, "pixel_values_videos", "a video's frame", True), frames),
        ("audio", _Kind(tokens.audio, tokens.audio_begin, "input_features", "a clip of sound", False), clips),
    ):
        if done.get(name) is not None:
            yield kind, _Embedded(kind, done[name])
        else:
            media = read(inputs, embedder)
            yield kind, None if media is None else _Media(kind, media)


@dataclass
class _Media:
    """Hold the media of one kind, taken in order by the runs of soft tokens."""

    kind: _Kind
    media: list[Medium]
    taken: int = 0

    def take(self, count: int) -> Medium:
        """Return the next medium, for a run of `count` soft tokens."""
        kind = self.kind
        if self.taken == len(self.media):
            raise ValueError(
                f"the prompts have more runs of {kind.one}'s soft token (id {kind.token}) than the {len(self.media)} "
                f"in {kind.argument}; {_SAME_CALL}"
            )
        medium = self.media[self.taken]
        self.taken += 1
        if medium.tokens != count:
            raise ValueError(
                f"{kind.argument}[{self.taken - 1}] makes {medium.tokens} soft tokens, and its place in the prompt has "
                f"{count} (id {kind.token}); was the prompt cut, or made with another budget?"
            )
        return medium

    def check_taken(self) -> None:
        """Raise a ValueError where media are left."""
        if self.taken < len(self.media):
            raise ValueError(
                f"{self.kind.argument} has {len(self.media)}, and the prompts have places for {self.taken} (runs of "
                f"id {self.kind.token}); {_SAME_CALL}"
            )


class _Embedded:
    """Hold media of one kind that transformers has embedded: `pooler_output`, [n, hidden] each, or [n, hidden] of
    all."""

    def __init__(self, kind: _Kind, output: Any) -> None:
        parts = output.pooler_output
        self.rows = (parts if isinstance(parts, Tensor) else torch.cat(tuple(parts))).detach()
        self.kind, self.taken = kind, 0

    def take(self, count: int) -> Medium:
        """Return the next `count` rows."""
        rows = self.rows[self.taken : self.taken + count]
        self.taken += count
        if len(rows) < count:
            raise self._unequal(f"more than {len(self.rows)}")
        return Medium(count, hash_of("embedded", rows), lambda: rows)

    def check_taken(self) -> None:
        """Raise a ValueError where rows are left."""
        if self.taken < len(self.rows):
            raise self._unequal(str(self.taken))

    def _unequal(self, places: str) -> ValueError:
        return ValueError(
            f"{self.kind.argument} makes {len(self.rows)} soft tokens, and the prompts have places for {places} (id "
            f"{self.kind.token}); {_SAME_CALL}"
        )


def _runs(ids: Tensor, token: int | None) -> list[tuple[int, int, int]]:
    """Return (row, start, end) of each run of `token` in ids [rows, n], in order of appearance."""
    if token is None:
        return []
    there = torch.nn.functional.pad((ids == token).to(torch.int8), (1, 1))  # [rows, 1 + n + 1]
    edges = there.diff(dim=1)  # [rows, n + 1]: 1 where a run starts, -1 after its end
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [(row, start, end) for (row, start), (_, end) in zip(starts, ends, strict=True)]


def _refuse_placeholders(ids: Tensor, runs: list[tuple[int, int, int]], kind: _Kind) -> None:
    """Raise a ValueError where a run stands behind its begin token: media were forgotten.

    A soft token without a begin token is no processor's: a model may have chosen this token, which then is one as any
    other.
    """
    for row, start, end in runs:
        if kind.begin is not None and start and int(ids[row, start - 1]) == kind.begin:
            raise ValueError(
                f"row {row} has {end - start} soft tokens of {kind.one} (id {kind.token}), and there is no "
                f"{kind.argument}; pass all that the processor made"
            )


def _check_types(ids: Tensor, types: Tensor | None, tokens: MediaTokens) -> None:
    if types is None:
        return
    types = torch.as_tensor(types).cpu()
    due = torch.zeros_like(ids)
    for number, token in enumerate((tokens.image, tokens.video, tokens.audio), 1):
        if token is not None:
            due[ids == token] = number
    if types.shape != ids.shape or not torch.equal(types.to(due.dtype), due):
        raise ValueError(
            "mm_token_type_ids must be 1, 2 and 3 where input_ids has soft tokens of pictures, videos and sound, and 0 "
            "elsewhere; leave it out, and it is made"
        )
