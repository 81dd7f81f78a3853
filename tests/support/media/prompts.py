"""Prompts with pictures, frames and sound for the tiny Gemma 4 models, whose embedded rows are random numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.model.decoder import Decoder
from specdec.model.media import MediaBlock, chunk_end
from specdec.model.states import States
from tests.support.tiny import VOCAB

HIDDEN = 64  # of the tiny models
IMAGE, AUDIO, VIDEO, BOI, EOI, BOA, EOA = MEDIA_IDS = range(240, 247)


class Medium(NamedTuple):
    """A picture, a frame of a video or a clip of sound: its soft token, its rows, and what it shows."""

    token: int
    rows: int
    shows: int = 0


class MediaPrompt(NamedTuple):
    ids: Tensor  # [n]
    media: tuple[MediaBlock, ...]

    def and_then(self, ids: Tensor) -> MediaPrompt:
        """The prompt with more text behind it."""
        return MediaPrompt(torch.cat((self.ids, ids)), self.media)


def picture(rows: int, shows: int = 0) -> Medium:
    return Medium(IMAGE, rows, shows)


def frame(rows: int, shows: int = 0) -> Medium:
    return Medium(VIDEO, rows, shows)


def sound(rows: int, shows: int = 0) -> Medium:
    return Medium(AUDIO, rows, shows)


def embedded(medium: Medium) -> Tensor:
    """Rows [n, hidden], about as large as the tiny models' scaled embeddings."""
    generator = torch.Generator().manual_seed(1 + medium.shows)
    return torch.randn(medium.rows, HIDDEN, generator=generator) * 0.6


def media_prompt(*parts: int | Medium, seed: int = 0) -> MediaPrompt:
    """A prompt of `parts`: numbers of random tokens of text, and media between their begin and end tokens."""
    dice, ids, media = random.Random(seed), list[int](), list[MediaBlock]()
    for part in parts:
        if isinstance(part, int):
            ids += [dice.randrange(3, MEDIA_IDS.start) for _ in range(part)]
            continue
        begin, end = (BOA, EOA) if part.token == AUDIO else (BOI, EOI)
        start = len(ids) + 1
        ids += [begin, *[part.token] * part.rows, end]
        key = hashlib.sha256(repr(part).encode()).digest()
        media.append(
            MediaBlock(start, start + part.rows, key, part.token != AUDIO, lambda part=part: embedded(part))  # type: ignore[misc]
        )
    assert max(ids) < VOCAB
    return MediaPrompt(torch.tensor(ids), tuple(media))


def read(
    decoder: Decoder, prompt: MediaPrompt, most: int, cache: KVCache | None = None, aux_layers: Sequence[int] = ()
) -> States:
    """The states of all rows of a prompt, read in chunks of `most` rows but for the edges of media."""
    cache, parts = cache or decoder.new_cache(), []
    while cache.length < len(prompt.ids):
        end = chunk_end(prompt.media, cache.length, len(prompt.ids), most)
        chunk = prompt.ids[cache.length : end]
        parts.append(decoder.forward(chunk, cache, aux_layers, prompt.media))
        cache.commit(len(chunk))
    return States.cat(parts)


def knowing_media(decoder: Decoder) -> Decoder:
    """The decoder with a spec that has the ids of media."""
    spec = replace(decoder.spec, media_ids=frozenset(MEDIA_IDS))
    return Decoder(
        spec, decoder.embedding, decoder.layers, decoder.norm, decoder.head, decoder.per_layer, decoder.kv_dtype
    )
