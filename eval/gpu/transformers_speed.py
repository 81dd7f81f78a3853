"""Time transformers' own generation of a model of the same shape, in bfloat16, with a static cache, not compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from eval.gpu.timing import call_seconds
from eval.synthetic.full_size import full_size_config

TOKENS, PROMPT = 32, 2048
NEEDED = 29 * 10**9  # bytes of the device's memory: 24 GB of weights, a static cache, and prefill


def transformers_figures(name: str, plain: float, prefill: float) -> dict[str, Any]:
    """Time a plain token and a prompt of transformers, beside ours: `plain` tokens and `prefill` tokens a second.

    Raises ValueError where the device has no room for 16 bits a weight.
    """
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED:
        raise ValueError(f"{name} in bfloat16 takes {NEEDED / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
    from transformers import AutoModelForCausalLM

    config = full_size_config(name)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 1000, (1, 64), dtype=torch.int64, device="cuda")
    prompt = torch.randint(3, 1000, (1, PROMPT), dtype=torch.int64, device="cuda")
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"cache_implementation": "static", "disable_compile": True}

    def generate(tokens: int) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **settings)

    @torch.inference_mode()
    def read() -> None:
        model(prompt, logits_to_keep=1)

    whole, first = (call_seconds(partial(generate, tokens), 2, warm=1) for tokens in (TOKENS, 1))
    token = (whole - first) / (TOKENS - 1)
    reading = call_seconds(read, 3, warm=1)
    return {
        "transformers_tokens_per_second": 1 / token,
        "transformers_prefill_tokens_per_second": PROMPT / reading,
        "transformers_compiled": False,
        "token_gain": plain * token,
        "prefill_gain": prefill / (PROMPT / reading),
    }
