"""How good an MTP head is: mean acceptance length, measured in the real decoding loop and simulated on finished texts.

What: `measure_drafts` decodes with drafts of a fixed length and counts; `simulate_acceptance` takes the same count from
the head's logits over finished texts. Why both: only decoding is believed (a head that was right 98% of the time in its
trainer was right 10% of the time in a server, SpecForge#533), and where the two disagree, the fault is in the trainer
rather than in the training of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from drafter.data.features import Features
from drafter.data.patience import PATIENT, Patience
from drafter.settings import Recipe
from drafter.train.loss import Candidates, unrolled_loss
from drafter.train.model import Network
from specdec.drafting.protocol import Drafter, FixedLength
from specdec.engine.engine import Engine
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.model.decoder import Decoder


def measure_drafts(
    backbone: Decoder,
    drafter: Drafter,
    prompts: Iterable[Tensor],
    *,
    draft_length: int,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    temperature: float = 0.0,
    seed: int = 0,
    longest: int | None = None,
    patience: Patience = PATIENT,
) -> GenerationStats:
    """Decode `prompts` ([n] int64) one by one with drafts of `draft_length` tokens; return the counts of the decoding.

    `mean_acceptance_length` of the result is the figure; texts end with a token of `eos_ids`, and at `longest` tokens.
    When `patience` is over the text that is under way, the first at least, ends where it is, and no other text begins.
    """
    longest = min(longest or backbone.context, backbone.context)

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts):
            if number and patience.over():
                return
            yield Request(
                prompt,
                min(len(prompt) + max_new_tokens, longest),
                Sampler.at_temperature(temperature, seed + number),
                lambda tokens, choice: choice.token in eos_ids or patience.over(),
            )

    stats = GenerationStats()
    engine = Engine(backbone, drafter, FixedLength(draft_length), stats=stats)
    for _ in engine.run(requests()):
        pass
    return stats


@torch.no_grad()
def teacher_forced(
    network: Network,
    embed: Callable[[Tensor], Tensor],
    texts: Iterable[Features],
    candidates: Candidates,
    draft_length: int,
) -> tuple[float, ...]:
    """Return the shares of drafts whose first token is right, whose first two are, and so on, from every position of
    the answers in `texts`.

    1 plus the sum of the shares is a mean acceptance length as if every position began a round. It is not the figure of
    decoding, which begins rounds where drafts end, and is taken from several times as many drafts.
    """
    recipe = Recipe(draft_length, deeper=1.0, soft=False)
    right, rows = torch.zeros(draft_length, dtype=torch.int64), 0
    for text in texts:
        if len(text) - draft_length < text.answer:
            continue
        found = unrolled_loss(network, embed, [text], 1.0, candidates, recipe).right[text.answer - 1 :]  # [rows, K]
        right += found.sum(dim=0)
        rows += len(found)
    return tuple((right / max(1, rows)).tolist())


@torch.no_grad()
def simulate_acceptance(
    network: Network,
    embed: Callable[[Tensor], Tensor],
    texts: Sequence[Features],
    candidates: Candidates,
    draft_length: int,
) -> float:
    """Return the mean acceptance length of greedy drafts over the answers in `texts`, without decoding.

    Every round of the decoding loop begins one token after the tokens that the round before emitted, so rounds are not
    spread evenly over a text. The simulation follows these rounds. The last `draft_length` tokens of a text are left
    out.
    """
    rounds, emitted, recipe = 0, 0, Recipe(draft_length, deeper=1.0, soft=False)
    for text in texts:
        if len(text) - draft_length < text.answer:
            continue
        right = unrolled_loss(network, embed, [text], 1.0, candidates, recipe).right  # [rows, K]
        accepted = right.sum(dim=1).tolist()  # of the draft at position row + 1
        position = text.answer
        while position <= len(accepted):
            emitted += accepted[position - 1] + 1
            position += accepted[position - 1] + 1
            rounds += 1
    return emitted / rounds if rounds else 1.0
