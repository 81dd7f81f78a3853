"""A tiny model with a chat format's own tokens, and tests that say what it writes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.engine.sampling import Sampler
from specdec.server.generation.sampling import Sampling
from tests.support.tiny import tiny_model
from tests.support.tiny_folder import CONTEXT


def make_chat_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random model (window 16, context 8,192) with `tokenizer`."""
    like = tiny_model("gemma3")
    config = copy.deepcopy(like.config)
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    type(like)(config).float().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "max_position_embeddings": CONTEXT}))
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def saying(tokens: Sequence[int]) -> Iterator[None]:
    """Every answer has `tokens`, as far as a constraint lets the model say them, and goes on at random."""
    made = Sampling.sampler

    def sampler(sampling: Sampling, prompt_tokens: int, seed: int | None) -> Sampler:
        def wanted(ids: Tensor, scores: Tensor) -> Tensor:
            at = ids.shape[1] - prompt_tokens
            if at < len(tokens):
                scores[0, tokens[at]] += 1e4
            return scores

        return Sampler(wanted, seed)

    Sampling.sampler = sampler  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sampling.sampler = made  # type: ignore[method-assign]
