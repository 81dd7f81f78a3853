"""Which sequences the next pass has, and how many rows of their prompts it reads.

Attention makes the last chunks of a long prompt up to twice as dear as the median one. Beside texts that decode a chunk
has half as many rows, so that no text waits for a token for much longer than a median chunk takes. One pass reads a
whole picture, however many rows it has. Rows of text before the picture get a pass of their own where the chunk's
length is then nearer to the one that it should have.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from specdec.cache import MAX_ROWS
from specdec.engine.sequence import Sequence

PROMPT_ROWS = MAX_ROWS  # of all prompts in a pass in which no text decodes
ROWS_BESIDE = PROMPT_ROWS // 2  # of all prompts in a pass beside texts that decode
DRAFT_ROWS = 64  # of a pass with several texts, pending tokens included: logits of every row are held at once


def next_batch(active: Several[Sequence]) -> list[Sequence]:
    """Return those of `active` that are in the next pass: all that decode, and chunks of prompts, the oldest first."""
    most = ROWS_BESIDE if any(sequence.decoding for sequence in active) else PROMPT_ROWS
    for sequence in active:
        sequence.chunk = most
    batch, prompt_rows = list[Sequence](), 0
    for sequence in active:
        if sequence.decoding:
            batch.append(sequence)
        elif sequence.lockstep is not None and sequence.last_chunk:
            if sequence.lockstep.ready:  # all of them, however many rows that makes
                batch.append(sequence)
        elif prompt_rows == 0 or prompt_rows + sequence.next_rows <= most:
            prompt_rows += sequence.next_rows
            batch.append(sequence)
        else:
            prompt_rows = most  # later prompts do not overtake this one
    return batch
