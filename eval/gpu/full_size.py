"""A 12B model with random weights on a GPU: what passes, drafts, prompts and memory cost.

Random weights have the time and the memory of real ones, and no text that means anything: acceptance is synthetic
(`eval.synthetic.acceptance`), around the drafts of an assistant of the published shape, for their time.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drafter.config import assistant_spec, extra_tensors
from drafter.files.checkpoint import build_assistant
from drafter.mtp_drafter import MTPDrafter
from eval.gpu.timing import bytes_in_use, call_seconds, launch_seconds
from eval.kernels.model_pass import bytes_per_pass, filled_cache, prefill, random_tokens
from eval.synthetic.acceptance import SyntheticAcceptance
from eval.synthetic.full_size import full_size_drafter, full_size_model
from eval.synthetic.random_weights import RandomCheckpoint, copies, random_blocks
from specdec import kernels
from specdec.hf import SpecdecForCausalLM
from specdec.model.decoder import Decoder

NAME = "gemma-4-12b"
PRODUCT, COPIES = (15360, 3840), 256 << 20  # bytes of copies that no cache holds
CONTEXT, PROMPT, LONG = 512, 2048, 32768
ROWS = (1, 2, 3, 4, 5, 8, 9, 16)
TOKENS, RATES = 96, (0.8, 0.6, 0.5)
Figures = dict[str, Any]


def product_figures(bandwidth: float, device: torch.device) -> Figures:
    """Time the largest product of a 12B model at several row counts, in 4 bits with a minimum and without."""
    found: Figures = {}
    for minimum in (False, True):
        w = random_blocks(*PRODUCT, 4, minimum).to(device)
        others = copies(w, COPIES)
        for rows in (1, 2, 4, 8, 16, 64):
            x = torch.randn(rows, PRODUCT[1], dtype=torch.bfloat16, device=device)
            kernels.block_linear(x, w)  # compiled before it is timed
            calls = [partial(kernels.block_linear, x, w) for w in others]
            seconds = launch_seconds(calls)
            found[f"{'minimum ' if minimum else ''}{rows}"] = {
                "us": seconds * 1e6,
                "share_of_bandwidth": w.nbytes / seconds / bandwidth,
            }
    return {"products": found, "product_share": found["1"]["share_of_bandwidth"]}


class FullSize:
    """Keep a 12B model with random weights on the GPU, and its assistant, to be timed."""

    def __init__(self, device: torch.device, name: str = NAME) -> None:
        """Build both, of the shape `name`, with an int8 cache. Raises ValueError where the memory has no room."""
        self.model: SpecdecForCausalLM = full_size_model(name, None, torch.int8, device)
        self.decoder: Decoder = self.model.decoder
        spec = assistant_spec(full_size_drafter(name), self.decoder.spec)
        checkpoint = RandomCheckpoint(spec.text, f"random assistant of {name}", extra_tensors(spec))
        self.drafter = MTPDrafter(
            lambda backbone: build_assistant(spec, checkpoint, backbone.dtype, backbone.device, "int8")
        )
        self.drafter.bind(self.decoder)

    def passes(self, bandwidth: float) -> Figures:
        """Time V(T) after CONTEXT positions, logits included, and a drafted token."""
        decoder, cache = self.decoder, filled_cache(self.decoder, CONTEXT)
        ids = random_tokens(decoder, max(ROWS))

        def run(rows: int) -> Tensor:
            logits = decoder.logits(decoder.forward(ids[:rows], cache).last)
            cache.commit(0)
            return logits

        times = {rows: call_seconds(partial(run, rows), 15) for rows in ROWS}
        states = decoder.forward(ids[:1], cache)
        cache.commit(1)
        proposer = self.drafter.start(cache)
        text = [*random_tokens(decoder, CONTEXT).tolist(), int(ids[0])]
        drafts = {k: call_seconds(partial(proposer.propose, text, states[0], k), 15) for k in (1, 4)}
        step = (drafts[4] - drafts[1]) / 3
        return {
            "bytes_per_pass": bytes_per_pass(decoder),
            "pass_ms": {str(rows): seconds * 1e3 for rows, seconds in times.items()},
            "draft_ms": {str(k): seconds * 1e3 for k, seconds in drafts.items()},
            "graphs": dict(kernels.graph_counts(decoder.device)),
            "v4": times[4] / times[1],
            "v8": times[8] / times[1],
            "draft_cost": step / times[1],
            "token_share": bytes_per_pass(decoder) / bandwidth / times[1],
        }

    def prefill(self) -> Figures:
        """Time a prompt of PROMPT tokens."""
        ids = random_tokens(self.decoder, PROMPT)

        def run() -> Tensor:
            return self.decoder.logits(prefill(self.decoder, ids, self.decoder.new_cache())[-1:])

        return {"prefill_tokens_per_second": PROMPT / call_seconds(run, 3, warm=1)}

    def decoding(self) -> Figures:
        """Time plain decoding, and drafting whose drafts are right at given rates; the texts must be the same."""
        ids = random_tokens(self.decoder, 64)[None]
        plain, plain_speed = self._generate(ids, speculation=False)
        text = plain[0].tolist()
        drafter = SyntheticAcceptance(self.drafter, text, RATES, self.decoder.spec.vocab_size)
        drafted, drafted_speed = self._generate(ids, drafter=drafter, draft_length=len(RATES))
        return {
            "plain_tokens_per_second": plain_speed,
            "drafted_tokens_per_second": drafted_speed,
            "mean_acceptance_length": self.model.last_stats.mean_acceptance_length,
            "drafted_gain": drafted_speed / plain_speed,
            "drafted_text_is_plain_text": bool(torch.equal(plain, drafted)),
        }

    def _generate(self, ids: Tensor, **options: Any) -> tuple[Tensor, float]:
        """Return the text of the second of two runs, and its tokens a second after the first."""
        settings: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "reuse": False}
        for _ in range(2):
            text = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)
        times = [seconds for seconds, _ in self.model.last_stats.timeline]
        gaps = sum(after - before for before, after in itertools.pairwise(times))
        return text, (TOKENS - 1) / gaps

    def memory(self, before: int | None) -> Figures:
        """Return the bytes of the device's memory that a text of LONG positions takes in all, after a pass and a draft,
        CUDA's context with them. `before`: `bytes_in_use` when the process began; None: all that is in use counts."""
        cache = filled_cache(self.decoder, LONG - 64)
        ids = random_tokens(self.decoder, 8)
        states = self.decoder.forward(ids, cache)
        self.decoder.logits(states.last)
        cache.commit(8)
        text = [*random_tokens(self.decoder, LONG - 64).tolist(), *ids.tolist()]
        self.drafter.start(cache).propose(text, states[7], 3)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        now = None if before is None else bytes_in_use()
        taken = total - free if before is None or now is None else now - before
        return {"memory_gb": taken / 1e9, "cache_gb": cache.nbytes / 1e9}
