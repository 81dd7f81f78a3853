"""Drafts of a pass: who proposes for each of its texts, and how much, planned for all of them together.

What: `propose_together`, of the `OpenEnd`s of a pass. A proposer that has to read the text itself may draft once it has
caught up with it, but for the few tokens that it reads together with the pending one (`NEAR`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, cast

from specdec.drafting.protocol import Composite, Draft, DraftLength, Proposer, ReadingProposer, SureProposer
from specdec.model.states import States

NEAR = 4  # tokens that a proposer reads at the cost of one


class OpenEnd(NamedTuple):
    """Hold a text whose next tokens are to be drafted.

    `tokens`: the whole text so far, the pending token last; `states`: of the row that chose the pending
    token; `room`: the longest draft that can be used.
    """

    proposer: Proposer
    tokens: Sequence[int]
    states: States
    room: int


class Proposals(NamedTuple):
    """Hold a draft for each text of a pass. `caught_up`: whether proposers read further besides, which took its
    time."""

    drafts: list[Draft]
    caught_up: bool


def propose_together(texts: Sequence[OpenEnd], lengths: DraftLength, beside: int = 0, most: int = 64) -> Proposals:
    """Return a draft for each of `texts`, which share a pass; `lengths` decides on source and length of each.

    `beside`: further rows of that pass. `most`: drafted tokens of all texts together.
    """
    composites = [_composite(text.proposer) for text in texts]
    able = [
        (text.proposer,) if one is None else one.able(text.tokens) for text, one in zip(texts, composites, strict=True)
    ]
    limits = [{one.name: min(text.room, one.max_draft) for one in ones} for text, ones in zip(texts, able, strict=True)]
    caught_up = False
    for text, ones, of in zip(texts, able, limits, strict=True):
        for one in ones:
            if hasattr(one, "behind") and of[one.name] > 0:
                caught_up |= _catch_up(text, cast(ReadingProposer, one), of, lengths)
    drafts = []
    rows = beside + len(texts)  # of the pass, as far as it is known
    plan = lengths.plan(limits, beside, most)
    for text, composite, ones, (name, k) in zip(texts, composites, able, plan, strict=True):
        draft = Draft()
        if k > 0:
            one = next(one for one in ones if one.name == name)
            if hasattr(one, "propose_while"):
                floors = lengths.floors(name, k, rows - 1)
                draft = cast(SureProposer, one).propose_while(text.tokens, text.states, k, floors)
                draft = draft.sound()
                if (worth := lengths.worth(name, draft.chances, rows - 1)) < len(draft.chances):
                    draft = draft.first(worth)
            else:
                draft = one.propose(text.tokens, text.states, k)
            assert len(draft.tokens) + len(draft.given_up) <= k
        if draft.tokens and composite is not None and not draft.given_up:
            more = composite.extend(text.tokens, draft, min(text.room, most) - len(draft.tokens))
            if more.tokens:
                kept = lengths.extend(draft.sources, more.sources[0], len(more.tokens), rows - 1)
                draft = draft.then(more.first(kept))
        rows, most = rows + len(draft.tokens), most - len(draft.tokens)
        drafts.append(draft)
    return Proposals(drafts, caught_up)


def _catch_up(text: OpenEnd, one: ReadingProposer, limits: dict[str, int], lengths: DraftLength) -> bool:
    """Let `one` read `text` chunk by chunk, as far as `lengths` allows it; return whether it read. While it is behind,
    its limit among `limits` is 0."""
    read, spent = False, 0.0
    while (left := one.behind(text.tokens)) > NEAR:
        if not lengths.may_catch_up(limits, one.name, left - 1, spent):
            limits[one.name] = 0
            break
        began = time.perf_counter()
        rows = one.catch_up(text.tokens)
        seconds = time.perf_counter() - began
        lengths.observe_reading(one.name, rows, seconds)
        read, spent = True, spent + seconds
    return read


def _composite(proposer: Proposer) -> Composite | None:
    # `isinstance` of a protocol takes 40 microseconds, and this is asked for every text of every pass.
    return cast(Composite, proposer) if hasattr(proposer, "able") else None
