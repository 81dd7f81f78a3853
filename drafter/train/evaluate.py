"""How good a head is: `drafted`, drafts of a fixed length in the real decoding loop, counted; and `walked`, the same
count taken from what the head says about finished texts.

Only the first is believed: a head that was right 98% of the time in its trainer was right 10% of the time in a server
(SpecForge#533). The second has to agree with it, which tells a broken trainer from a head that has not learned enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from drafter.data.features import Features
from drafter.data.patience import PATIENT, Patience
from drafter.train.loss import Candidates, Recipe, unrolled
from drafter.train.model import Network
from specdec.drafting.draft_length import FixedLength
from specdec.drafting.protocol import Drafter
from specdec.engine.engine import Request, decode
from specdec.engine.sampling import Sampler
from specdec.engine.stats import GenerationStats
from specdec.model.decoder import Decoder


def drafted(
    backbone: Decoder,
    drafter: Drafter,
    prompts: Iterable[Tensor],
    *,
    draft_length: int,
    max_new_tokens: int,
    ends: frozenset[int],
    temperature: float = 0.0,
    seed: int = 0,
    longest: int | None = None,
    patience: Patience = PATIENT,
) -> GenerationStats:
    """What decoding `prompts` ([n] int64) one by one with drafts of `draft_length` tokens did.

    `mean_acceptance_length` of the result is the figure; texts end with a token of `ends`, and at `longest` tokens.
    When `patience` is over the text that is under way, the first at least, ends where it is, and no other begins.
    """
    longest = min(longest or backbone.context, backbone.context)

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts):
            if number and patience.over():
                return
            yield Request(
                prompt,
                min(len(prompt) + max_new_tokens, longest),
                Sampler.warmed(temperature, seed + number),
                lambda tokens, choice: choice.token in ends or patience.over(),
                lambda verdict, logits: None,
            )

    stats = GenerationStats()
    for _ in decode(backbone, drafter, FixedLength(draft_length), requests(), stats):
        pass
    return stats


@torch.no_grad()
def walked(
    network: Network,
    embed: Callable[[Tensor], Tensor],
    texts: Sequence[Features],
    candidates: Candidates,
    draft_length: int,
) -> float:
    """Mean acceptance length of greedy drafts over the answers in `texts`, without decoding.

    Every round of the decoding loop begins one token after what the round before emitted, so rounds are not spread
    evenly over a text: this follows them. The last `draft_length` tokens of a text are left out.
    """
    rounds = emitted = 0
    for text in texts:
        if len(text) - draft_length < text.answer:
            continue
        right = unrolled(network, embed, [text], 1.0, candidates, Recipe(steps=draft_length)).right  # [rows, K]
        accepted = right.sum(dim=1).tolist()  # of the draft at position row + 1
        position = text.answer
        while position <= len(accepted):
            emitted += accepted[position - 1] + 1
            position += accepted[position - 1] + 1
            rounds += 1
    return emitted / rounds if rounds else 1.0
