"""Costs of whole passes of a model: V(T), prefill, and plain decoding, on a decoder that is already loaded.

What: `pass_costs` times `forward` and `logits` as the loop calls them, always at the same positions: nothing is
committed, so that the cache stays as it is. `prefill_speed` and `decode_speed` time the loop's own prefill and
`generate`. Why random token ids: they cost as much as real ones. Left out: drafting, and the sampler, which `run.py
bench` times with everything else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from eval.kernels.timing import Effort, KernelTiming, alternate
from specdec.cache import KVCache
from specdec.hf import SpecdecForCausalLM
from specdec.model.adapters.adapter import NONE
from specdec.model.decoder import Decoder

LARGEST = 0.02  # of random K and V


def bytes_per_pass(decoder: Decoder) -> int:
    """Return the bytes of weights that one pass reads: all but an embedding that is not the head as well."""
    return decoder.nbytes - (0 if decoder.head is decoder.embedding else decoder.embedding.nbytes)


def pass_costs(decoder: Decoder, context: int, rows: Sequence[int], effort: Effort) -> dict[int, KernelTiming]:
    """Time V(T) for every T of `rows`, in turn, after `context` positions of random K and V.

    Raises ValueError when the model has no room for these positions.
    """
    if context + max(rows) > decoder.spec.max_positions:
        raise ValueError(
            f"{context} positions and {max(rows)} rows exceed the model's {decoder.spec.max_positions}: "
            "ask for a smaller --context"
        )
    ids = random_tokens(decoder, max(rows))
    cache = filled_cache(decoder, context)

    def one(count: int) -> Callable[[], object]:
        def run() -> Tensor:
            logits = decoder.logits(decoder.forward(ids[:count], cache).last)
            cache.commit(0)
            return logits

        return run

    return alternate({count: one(count) for count in rows if count <= cache.max_rows}, effort)


def adapter_costs(
    decoder: Decoder, context: int, rows: Sequence[int], adapter: str, effort: Effort
) -> dict[int, tuple[KernelTiming, KernelTiming]]:
    """Time V(T) without an adapter and with `adapter`, in turn, for every T of `rows`."""
    ids, found = random_tokens(decoder, max(rows)), {}

    def one(name: str, count: int) -> Callable[[], object]:
        cache = filled_cache(decoder, context, name)

        def run() -> Tensor:
            logits = decoder.logits(decoder.forward(ids[:count], cache).last, [cache.adapter] * count)
            cache.commit(0)
            return logits

        return run

    for count in rows:
        timings = alternate({name: one(name, count) for name in (NONE, adapter)}, effort)
        found[count] = timings[NONE], timings[adapter]
    return found


@torch.inference_mode()
def filled_cache(decoder: Decoder, context: int, adapter: str | None = None) -> KVCache:
    """Return a cache of `context` positions with random K and V, which cost what computed ones cost: to compute 16,000
    positions of a 12B model takes most of an hour. All numbers are within `LARGEST`, in every type: scores that are 85
    apart or more make products that are no normal numbers, which take ten times as long."""
    cache = decoder.new_cache(adapter=adapter)
    generator = torch.Generator(decoder.device).manual_seed(context)
    for store in cache.stores:
        if store is None:
            continue
        store.reserve(context)
        for part in store.parts:
            if part.dtype == torch.int8:
                part.random_(-127, 128, generator=generator)
            elif part is store.key_scale or part is store.value_scale:
                part.fill_(LARGEST / 127)
            else:
                part.uniform_(-LARGEST, LARGEST, generator=generator)
    cache.restore(context, context)
    return cache


def prefill(decoder: Decoder, ids: Tensor, cache: KVCache) -> Tensor:
    """Commit ids [n] in the chunks that the engine has; return the last states of the last chunk."""
    hidden = torch.empty(0, dtype=decoder.dtype)
    for chunk in torch.split(ids, cache.max_rows):
        hidden = decoder.forward(chunk, cache).last
        cache.commit(len(chunk))
    return hidden


def prefill_speed(decoder: Decoder, tokens: int, effort: Effort) -> KernelTiming:
    """Time the way from `tokens` new tokens to the logits of the last one, in an empty cache."""
    ids = random_tokens(decoder, tokens)

    def run() -> Tensor:
        cache = decoder.new_cache()
        return decoder.logits(prefill(decoder, ids, cache)[-1:])

    return alternate({"prefill": run}, effort)["prefill"]


@dataclass(frozen=True)
class Decoding:
    """Keep the times of a plain decoding: `tokens` in all, the first token by the prefill; `seconds` between the
    others."""

    tokens: int
    prompt_tokens: int
    prefill_seconds: float
    seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens a second after the first token."""
        return len(self.seconds) / sum(self.seconds)

    @property
    def median_tokens_per_second(self) -> float:
        """Return the tokens a second of the median token, which another process did not delay."""
        return 1 / median(self.seconds)


def decode_speed(model: SpecdecForCausalLM, prompt_tokens: int, tokens: int) -> Decoding:
    """Time `model.generate`, plain and greedy, for `tokens` new tokens (2 or more) after a random prompt."""
    ids = random_tokens(model.decoder, prompt_tokens)[None]
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        speculation=False,
        reuse=False,
    )
    times = [seconds for seconds, _ in model.last_stats.timeline]
    assert len(times) == tokens and times[-1] <= time.perf_counter() - began
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Decoding(tokens, prompt_tokens, times[0], gaps)


def random_tokens(decoder: Decoder, count: int) -> Tensor:
    """Return random token ids [count] int64 on the decoder's device, none of them of media; the same ids for the same
    count and vocabulary."""
    generator, spec = torch.Generator().manual_seed(count), decoder.spec
    ids = torch.randint(0, spec.vocab_size, (count,), generator=generator)
    ids[torch.isin(ids, torch.tensor(sorted(spec.media_ids), dtype=torch.int64))] = 0
    return ids.to(decoder.device)
