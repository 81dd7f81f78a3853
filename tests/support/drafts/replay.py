"""Replays of texts for which it is known how much of any draft would have been right: draft lengths without a model.

A text is, by source, for each of its tokens how many tokens the source would draft there and how many of them would be
right. `recorded` reads real ones (see `record_drafts.py`), `made` makes them up. Costs are in plain passes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from specdec.drafting.costs import Costs
from specdec.drafting.protocol import Drafted, DraftLength, FixedLength, tokens_until

LONGEST = 8
HEAD, SUFFIX, SHORT = "mtp", "suffix", "suffix-short"

Text = Mapping[str, Sequence[tuple[int, int]]]  # by source and token of the text: tokens drafted, tokens right
Chances = Mapping[str, Sequence[Sequence[float]]]  # likewise, of sources that say so: how likely each token is
Process = Callable[[random.Random], int]  # how many drafted tokens are right


def costs(*passes: float, step: float = 0.08, start: float = 0.03) -> Costs:
    """V(1), V(2), ... and a head's d and c; a suffix match costs next to nothing."""
    table = dict(enumerate(passes, start=1))
    return Costs(table, {HEAD: step, SUFFIX: 0.002, SHORT: 0.002}, {HEAD: start, SUFFIX: 0.003, SHORT: 0.003})


COSTS = {
    "AVX-512": costs(1, 1.05, 1.1, 1.16, 1.24, 1.33, 1.42, 1.51, 1.65),
    "AVX2": costs(1, 1.1, 1.27, 1.46, 1.72, 2.02, 2.25, 2.5, 2.9, start=0.05),
    "AVX2, dear rows": costs(1, 1.17, 1.5, 1.88, 2.3, 2.75, 3.15, 3.55, 4.0, start=0.08),
    "flat, as on a GPU": costs(1, 1.01, 1.01, 1.02, 1.02, 1.03, 1.03, 1.04, 1.05, step=0.05, start=0.05),
    "steep": costs(1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, start=0.02),
}


def each(*chances: float) -> Process:
    """Each token is right with a chance of its own, the last one's for all further ones, where those before it were."""

    def draw(draws: random.Random) -> int:
        right = 0
        while right < LONGEST and draws.random() < chances[min(right, len(chances) - 1)]:
            right += 1
        return right

    return draw


def first(tokens: int) -> Process:
    """So many tokens are right, always."""
    return lambda draws: tokens


def all_or_none(draws: random.Random) -> int:
    """Nine drafts in ten are all right or all wrong."""
    return draws.choice((0, LONGEST)) if draws.random() < 0.9 else draws.randrange(1, LONGEST)


def made(tokens: int, seed: int, *phases: tuple[int, Process], source: str = HEAD) -> Text:
    """A text whose drafts follow each of `phases` for so many tokens, over and over."""
    draws = random.Random(seed)
    order = [process for count, process in phases for _ in range(count)]
    return {source: [(LONGEST, order[i % len(order)](draws)) for i in range(tokens)]}


def recorded() -> dict[str, Text]:
    """Six real texts by the name of their prompt."""
    texts = json.loads(Path(__file__).with_name("drafts.json").read_text())
    return {
        name: {source: list(zip(map(int, drafted), map(int, right), strict=True)) for source, (drafted, right, _) in by}
        for name, by in ((name, sources.items()) for name, sources in texts.items())
    }


def recorded_chances() -> dict[str, Chances]:
    """How likely the head took its tokens to be, of the same texts."""
    texts = json.loads(Path(__file__).with_name("drafts.json").read_text())
    found = dict[str, Chances]()
    for name, sources in texts.items():
        digits = sources[HEAD][2]
        chances = [int(digits[at : at + 2]) / 100 + 0.005 for at in range(0, len(digits), 2)]
        found[name] = {HEAD: [chances[at : at + LONGEST] for at in range(0, len(chances), LONGEST)]}
    return found


def joined(texts: Sequence[Text]) -> Text:
    """One text after the other."""
    return {source: [drafts for text in texts for drafts in text[source]] for source in texts[0]}


class Reached(NamedTuple):
    """How far a replay has come after a round."""

    token: int  # of the text, from its beginning
    seconds: float


def replay(
    lengths: DraftLength,
    text: Text,
    costs: Costs,
    begin: int = 0,
    rounds: int | None = None,
    chances: Chances | None = None,
) -> list[Reached]:
    """What `lengths` makes of `text` from its token `begin`, round by round."""
    token, seconds, history = begin, 0.0, list[Reached]()
    end = len(next(iter(text.values())))
    while token < end and (rounds is None or len(history) < rounds):
        drafted = _draft(lengths, text, token, chances or {})
        right = drafted.accepted
        draft, verify = costs.of_draft(*drafted.own) if drafted.own else 0.0, costs.of_pass(len(drafted.sources) + 1)
        lengths.observe([drafted], 0, draft, verify)
        token, seconds = token + right + 1, seconds + draft + verify
        history.append(Reached(token, seconds))
    return history


def _draft(lengths: DraftLength, text: Text, token: int, chances: Chances) -> Drafted:
    """The draft at a token of the text. Sources compete as in `specdec.drafting`."""
    able = list(text)
    if len(text) > 1:
        able = [HEAD, SHORT] if text[SHORT][token][0] else [HEAD]
        able = [SUFFIX, HEAD] if text[SUFFIX][token][0] else able
    source, k = lengths.plan([dict.fromkeys(able, LONGEST)])[0]
    there, right = text[source][token]
    k = min(k, there)
    sure, given_up = tuple[float, ...](), 0
    if k and source in chances:
        sure = tuple(chances[source][token][:k])
        made = tokens_until(sure, lengths.floors(source, k))
        sure, k = sure[:made], lengths.worth(source, sure[:made])
        given_up = made - k
    sources, right = [source] * k, min(k, right)
    if sources and not given_up and source == HEAD and SUFFIX in text and token + k < len(text[SUFFIX]):
        # What a match would add to a wrong draft is not known; what is added to a right one stands at its end.
        there, more = text[SUFFIX][token + k]
        added = lengths.extend(sources, SUFFIX, min(there, LONGEST - k))
        sources, right = sources + [SUFFIX] * added, right + (min(added, more) if right == k else 0)
    return Drafted(tuple(sources), right, sure, (source,) * given_up)


class Speed(NamedTuple):
    """Tokens and the seconds that they took; sums of them are of several texts."""

    tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Speed) -> Speed:
        return Speed(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def between(history: Sequence[Reached], begin: int, end: int) -> Speed:
    """The rounds from `begin` to `end`."""
    before = history[begin - 1] if begin else Reached(0, 0.0)
    return Speed(history[end - 1].token - before.token, history[end - 1].seconds - before.seconds)


def fixed(text: Text, costs: Costs, begin: int, end: int) -> list[Speed]:
    """Each fixed length, from 0, on the tokens `begin` to `end` of `text`."""
    if len(text) == 1:
        ((source, drafts),) = text.items()
        return [_alone(source, drafts, costs, k, begin, end) for k in range(LONGEST + 1)]
    part = {source: drafts[:end] for source, drafts in text.items()}
    eos_ids = [replay(FixedLength(k), part, costs, begin)[-1] for k in range(LONGEST + 1)]
    return [Speed(last.token - begin, last.seconds) for last in eos_ids]


def _alone(source: str, drafts: Sequence[tuple[int, int]], costs: Costs, k: int, begin: int, end: int) -> Speed:
    """`k` tokens of the only source in each round: what `replay` would say, some times sooner."""
    rounds, token = [0] * (k + 1), begin  # rounds by tokens drafted
    while token < min(end, len(drafts)):
        there, right = drafts[token]
        rounds[min(k, there)] += 1
        token += min(k, right) + 1
    seconds = sum(n * (costs.of_pass(i + 1) + costs.of_draft(source, i)) for i, n in enumerate(rounds))
    return Speed(token - begin, seconds)
