"""Calibration: measure the costs of a pass and of a drafted token on this machine, V, s, c, d and e, in about a second.

Passes of different lengths take turns, so that a neighbour that slows the machine down slows all of them: only their
ratios count. A model whose passes are long gets few measurements, and lines between them.

What a pass over a mixture of experts costs depends on how many experts its rows use together, so there the rows are a
text that the model writes itself, sampled: their routings are those of drafts that could be right. Each sweep takes
another stretch of the text, and the median of the sweeps counts, because the cheapest one is that with the fewest
experts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import cast

import torch

from specdec.drafting.costs import Costs
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Composite, Drafter, Proposer, ReadingProposer
from specdec.model.decoder import Decoder
from specdec.util.threads import is_narrowed, one_torch_thread

SECONDS = 1.0  # at most, but for models whose few passes take longer
SWEEPS = 8
FEW = (1, 2, 5, 9)  # row counts for models with long passes
MANY = (16, 32, 64)  # row counts of several texts' passes, measured when several texts are decoded
DRAFT = 4  # tokens
TEXTS = 4  # at most, to measure what a further text costs
READ = 17  # tokens of a text that a proposer reads to measure what reading costs, the pending one among them


def calibrate(lengths: AdaptiveLength, backbone: Decoder, drafter: Drafter, texts: int = 1) -> AdaptiveLength:
    """Measure the costs of `lengths` where they are missing, and return `lengths`; `drafter` is bound.

    Costs are missing where they were never measured, or measured for another number of threads, or for fewer than
    `texts` texts in a pass. Of several callers at once one measures; the others go on with the costs that are known.
    """
    if drafter.max_draft and not is_narrowed() and lengths.claim(torch.get_num_threads(), texts):
        try:
            most = lengths.longest + 1
            wide = [rows for rows in MANY if texts > 1 and rows < 2 * (texts + most)]
            costs = measure_costs(backbone, drafter, most, wide, min(texts, TEXTS))
        except BaseException:
            lengths.measured_for = None  # the next call measures
            raise
        if costs is not None:
            lengths.calibrate(costs)
    return lengths


@torch.inference_mode()
def measure_costs(
    backbone: Decoder,
    drafter: Drafter,
    most: int,
    wide: Sequence[int] = (),
    texts: int = 1,
    seconds: float = SECONDS,
) -> Costs | None:
    """Return the costs of passes over 1 to `most` rows and over `wide` rows, of a further text where `texts` is more
    than 1, and of `drafter`'s tokens; None where the context has no room for the measurement. The passes read a text
    without meaning, or one that a mixture of experts wrote."""
    longest_pass, mixture = max((most, *wide)), backbone.spec.experts is not None
    if backbone.context < most + longest_pass + 1:
        return None
    began = time.perf_counter()
    caches, vocabulary = [backbone.new_cache() for _ in range(texts)], backbone.spec.vocab_size
    own = sampled_text(backbone, 2 * most) if mixture else []
    text = [*own, *((7919 * i + 104729) % vocabulary for i in range(len(own), longest_pass))]
    first = 0  # of the rows of a pass, among those of `text`
    ids = torch.tensor(text, dtype=torch.int64, device=backbone.device)  # [longest_pass, or more]

    def verify(*rows: int) -> float:
        before = time.perf_counter()
        starts = [min(first, len(ids) - n) for n in rows]
        parts = [ids[start : start + n] for start, n in zip(starts, rows, strict=True)]
        states = backbone.forward_many(parts, caches[: len(rows)], drafter.aux_layers)
        logits = backbone.logits(states.last)
        with one_torch_thread():  # as in the engine: torch's other thread would poll while the next pass runs
            logits.argmax(dim=-1).tolist()  # waits for a GPU
        return time.perf_counter() - before

    for cache in caches:
        states = backbone.forward(ids[:most], cache, drafter.aux_layers)  # the first pass of all warms up
        cache.commit(most)
    proposer = drafter.start(caches[-1])
    short = verify(1)
    rows = range(1, most + 1) if short * 2 * most < seconds else [n for n in FEW if n <= most]
    passes: dict[tuple[int, ...], list[float]] = {(n,): [] for n in (*rows, *wide)}
    # Passes of several texts, and of as many rows of one text: what they differ by is what the texts cost.
    pairs = [((n * texts,), (n,) * texts) for n in (1, 2) if texts > 1]
    passes |= {each: [] for pair in pairs for each in pair if each not in passes}
    longest = min(DRAFT, drafter.max_draft)
    drafts: dict[str, dict[int, list[float]]] = {}  # by source and tokens
    aside = None  # the cache of another text, for proposers that read
    if _readers(proposer, text[:most]):
        aside = backbone.new_cache()
        proposer.propose(text[:most], states[-1], 1)  # reads all but the last token
    readings: dict[str, list[float]] = {}  # by source, of READ - 1 tokens
    for sweep in range(SWEEPS):
        first = most - sweep % most if mixture else 0  # where the text goes on, then earlier and earlier
        # Each draft comes after a pass, which has driven the drafter's weights out of the caches, as in decoding.
        due = sorted({1, longest})
        for each in passes if sweep % 2 == 0 else reversed(passes):
            passes[each].append(verify(*each))
            if due:
                before = time.perf_counter()
                made = proposer.propose(text[:most], states[-1], due.pop(0))
                if made.tokens:
                    times = drafts.setdefault(made.sources[0], {}).setdefault(len(made.tokens), [])
                    times.append(time.perf_counter() - before)
        unlike = [(7919 * i + 104729 + 7 * (sweep + 1)) % vocabulary for i in range(READ)]
        for reader in [] if aside is None else _readers(drafter.start(aside), unlike):
            if reader.behind(unlike) == READ:
                before = time.perf_counter()
                reader.catch_up(unlike)
                readings.setdefault(reader.name, []).append(time.perf_counter() - before)
        spent = time.perf_counter() - began
        if spent + spent / (sweep + 1) > seconds:
            break
    usual = median if mixture else min  # disturbances only add time
    least = {each: usual(times) for each, times in passes.items()}
    costs = Costs(plausible({each[0]: time for each, time in least.items() if len(each) == 1}))
    if pairs:
        further = [(least[several] - costs.passes[one[0]]) / (texts - 1) for one, several in pairs]
        costs.text = max(0.0, sum(further) / len(further))
    for source, by_length in drafts.items():
        best = {k: min(times) for k, times in by_length.items()}
        few, many = min(best), max(best)
        step = max(0.0, best[many] - best[few]) / (many - few) if many > few else best[few] / few
        costs.steps[source], costs.starts[source] = step, max(0.0, best[few] - few * step)
    for source, times in readings.items():
        costs.readings[source] = max(0.0, min(times) - costs.steps.get(source, 0.0)) / (READ - 2)
    return costs


def _readers(proposer: Proposer, text: Sequence[int]) -> list[ReadingProposer]:
    able = proposer.able(text) if isinstance(proposer, Composite) else (proposer,)
    return [cast(ReadingProposer, one) for one in able if hasattr(one, "behind")]


def sampled_text(backbone: Decoder, tokens: int) -> list[int]:
    """Return a text of `tokens` that the backbone writes from nothing, each token drawn from what it expects, the same
    one for the same model: greedy text may repeat itself for ever."""
    cache, generator, text = backbone.new_cache(), torch.Generator().manual_seed(0), [1]
    while len(text) <= tokens:
        ids = torch.tensor(text[-1:], dtype=torch.int64, device=backbone.device)
        logits = backbone.logits(backbone.forward(ids, cache).last)[0].cpu()
        cache.commit(1)
        text.append(int(torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)))
    return text[1:]


def plausible(measured: Mapping[int, float]) -> dict[int, float]:
    """Return V(rows) without what only a disturbance explains: fewer rows never take longer than more rows, and rows
    never take longer than they do in two passes. Disturbances only add time, so a figure is only ever lowered."""
    found = dict(sorted(measured.items()))
    rows = list(found)
    for fewer, more in zip(rows[-2::-1], rows[:0:-1], strict=True):
        found[fewer] = min(found[fewer], found[more])
    for n in rows:
        parts = (found[part] + found[n - part] for part in rows if part < n and n - part in found)
        found[n] = min(found[n], *parts, found[n])
    return found
