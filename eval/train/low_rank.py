"""A small LoRA for experiments: answers in a style that a rule makes, and an adapter trained on them with torch.

What: `restyle` (a numbered list in capitals), `train_adapter`, which leaves a PEFT folder. Why not PEFT: an experiment
needs A and B of a rank and an optimizer, and nothing more. The base model is transformers' own, in float32.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from drafter.data.given import GivenText
from specdec.util.atomic import replacing
from specdec.weights.hub.paths import model_path

RANK, ALPHA = 8, 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RATE, _TOKENS, _WARMUP = 1e-3, 512, 5  # learning rate; tokens and number of steps


class Trained(NamedTuple):
    """Keep what training an adapter did: steps, and the mean cross entropy of the first and last five of them."""

    steps: int
    first: float
    last: float


def restyle(text: str) -> str:
    """Return `text` as a numbered list in capitals, a sentence or line of it an item."""
    pieces = (re.sub(r"^[\W\d_]+", "", piece).strip() for piece in re.split(r"(?<=[.!?])\s+|\n+", text))
    return "\n".join(f"{i}. {piece.upper()}" for i, piece in enumerate(filter(None, pieces), start=1))


class LowRank(nn.Module):
    """Add (alpha / rank) * B A x to a linear layer; A [rank, in] begins random, B [out, rank] zero."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(RANK, base.in_features, generator=generator, dtype=torch.float32)
        self.down = nn.Parameter(down * base.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, the low-rank part added."""
        found: Tensor = self.base(x)
        return found + F.linear(F.linear(x, self.down), self.up) * (ALPHA / RANK)


def adapted_linears(model: nn.Module) -> dict[str, LowRank]:
    """Give the linear layers called `MODULES` a low-rank part, in place; return those by name. Nothing else learns."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found: dict[str, LowRank] = {}
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in MODULES]
    for seed, (name, linear) in enumerate(linears):
        parent, _, own = name.rpartition(".")
        found[name] = LowRank(linear, seed)
        setattr(model.get_submodule(parent), own, found[name])
    return found


def train_adapter(
    name: str, texts: Sequence[GivenText], folder: Path, minutes: float, now: Callable[[], float] = time.monotonic
) -> Trained:
    """Train an adapter of the model `name` on the answers of `texts`, and write it to `folder` as PEFT does.

    Raises:
        ValueError: transformers cannot load the model.
    """
    path = model_path(name)
    where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent if where else path, dtype=torch.float32, **where)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{path}: transformers does not load it in float32 ({error})") from error
    parts = adapted_linears(model)
    parameters = [parameter for part in parts.values() for parameter in (part.down, part.up)]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)
    rng, losses, end = random.Random(0), list[float](), now() + 60 * minutes
    order: list[GivenText] = []
    while not losses or now() < end:
        rate = _RATE * min(1.0, (len(losses) + 1) / _WARMUP)
        optimizer.param_groups[0]["lr"] = rate
        batch: list[GivenText] = []
        while sum(len(text.tokens) for text in batch) < _TOKENS:
            if not order:
                order = rng.sample(list(texts), len(texts))
            batch.append(order.pop())
        learned = sum(len(text.tokens) - text.answer for text in batch)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for text in batch:
            logits = model(input_ids=text.tokens[None]).logits[0, text.answer - 1 : -1]  # [answer, vocab]
            loss = F.cross_entropy(logits, text.tokens[text.answer :], reduction="sum") / learned
            torch.autograd.backward(loss)
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    _save(folder, name, parts)
    return Trained(len(losses), _mean(losses[:5]), _mean(losses[-5:]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _save(folder: Path, name: str, parts: dict[str, LowRank]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, part in parts.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = part.down.detach()
        tensors[f"base_model.model.{module}.lora_B.weight"] = part.up.detach()
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in parts}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
