"""How good a head is: drafts of a fixed length in the real decoding loop, counted.

Nothing else predicts it: a head that was right 98% of the time in its trainer was right 10% of the time in a server
(SpecForge#533).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from specdec.control import FixedLength
from specdec.decode import Request, decode
from specdec.drafting import Drafter
from specdec.model.decoder import Decoder
from specdec.sampling import Sampler, warmed
from specdec.stats import GenerationStats


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
) -> GenerationStats:
    """What decoding `prompts` ([n] int64) one by one with drafts of `draft_length` tokens did.

    `mean_acceptance_length` of the result is the figure; texts end with a token of `ends`.
    """
    drafter.bind(backbone)
    requests = [
        Request(
            prompt,
            min(len(prompt) + max_new_tokens, backbone.spec.max_positions),
            Sampler(warmed(temperature), seed + number if temperature else None),
            lambda tokens, choice: choice.token in ends,
            lambda verdict, logits: None,
        )
        for number, prompt in enumerate(prompts)
    ]
    stats = GenerationStats()
    for _ in decode(backbone, drafter, FixedLength(draft_length), requests, stats):
        pass
    return stats
