"""Media in a prompt: runs of soft tokens, whose rows are embedded pictures and sound instead of looked-up embeddings.

What: `MediaBlock`, the one record of a picture, a frame of a video or a clip of sound, and what a pass and a prompt's
chunks ask of a list of them. Left out: how pixels and samples become rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from specdec.cache import MediaKey


@dataclass(frozen=True)
class MediaBlock:
    """Hold one run of soft tokens in a prompt: a picture, a frame of a video, or a clip of sound.

    A clip may be several blocks, one after the other: its rows see earlier ones alone.
    """

    start: int  # position of its first soft token in the prompt, padding not counted
    end: int  # after its last one
    key: bytes  # hash of content and budget: what its rows depend on
    whole: bool  # a picture or frame: its rows see each other in sliding layers, and are in one pass
    rows: Callable[[], Tensor]  # embeds it, [end - start, hidden], when a pass needs it and not before

    @property
    def place(self) -> MediaKey:
        """Return what tells the block from others in a cache."""
        return MediaKey(self.start, self.end, self.key)

    def moved(self, by: int) -> MediaBlock:
        """Return the block `by` positions further on."""
        return replace(self, start=self.start + by, end=self.end + by)

    def embedded_once(self) -> MediaBlock:
        """Return a block that keeps its rows from the first use on: several passes may read a part of them."""
        return replace(self, rows=cache(self.rows))


MediaBlocks = Sequence[MediaBlock]


def check_media(media: MediaBlocks, length: int) -> None:
    """Raise a ValueError where the blocks of a prompt of `length` tokens are empty, overlap, or are out of order."""
    end = 0
    for block in media:
        if not end <= block.start < block.end <= length:
            raise ValueError(
                f"a media block has the positions {block.start} to {block.end - 1}, in a prompt of {length} tokens and "
                f"after blocks that end at {end}; list blocks by their positions"
            )
        end = block.end


def within(media: MediaBlocks, start: int, end: int) -> list[MediaBlock]:
    """Return the blocks with rows at positions start .. end - 1."""
    return [block for block in media if block.start < end and start < block.end]


def chunk_end(media: MediaBlocks, start: int, end: int, most: int) -> int:
    """Return where the chunk of a prompt ends that begins at `start`: `most` rows further, and at `end` at the latest.

    A chunk does not cut a whole block. It ends at the block's start or at its end, whichever is nearer to `most`, and
    has rows in any case. A chunk also ends where the last block does: a later prompt may ask something else about the
    same media, and then the cache at that length serves.
    """
    stop = min(start + most, end)
    if media and start < media[-1].end < stop:
        return media[-1].end
    for block in within(media, start, end):
        if block.whole and block.start < stop < block.end:
            before, after = stop - block.start, block.end - stop
            return block.end if block.start <= start or after <= before else block.start
    return stop
