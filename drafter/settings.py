"""What a user may choose of a training run, and the defaults, which the command line shows and a program gets alike.

Why apart from what reads them: neither torch nor transformers is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LATER = ("decay", "chance", "draft")  # what a later step of a draft counts


def fast_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 itself; elsewhere bfloat16 is slower than float32."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True)
class Answering:
    """Say how prompts become texts.

    `temperatures` are taken in turn by the number of the prompt. `max_batch`: texts in a pass; it never changes a word.
    """

    max_new_tokens: int = 200
    max_prompt: int = 640  # tokens; longer prompts are left out
    temperatures: tuple[float, ...] = (0.0,)
    seed: int = 0
    max_batch: int = 48


@dataclass(frozen=True)
class Shape:
    """Describe the sizes of a head that a user asks for; None takes the backbone's own size."""

    depth: int | None = None
    width: int | None = None
    draft_vocab: int = 8192
    bigram: int = 0
    bits: int = 8
    aux_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Say what the loss is made of.

    `soft`: whether the target is the backbone's distribution over the candidates, not its choice. `deeper`: the share
    of rows that go on after the first step, chosen at random and counted for the others: the first step of a draft is
    most of what has to be learned, and costs a fraction of a whole unroll. `later`: what the cross entropy of a later
    step counts. "decay": `decay` to the power of the steps before it. "chance": the chance that those are accepted, the
    product of the chances that the head gives the text's tokens. "draft": 1 where the head's own draft so far is the
    text, else 0; so the head learns from its own drafts, and where a draft leaves the text no label is known.
    `overlap`: how soon the loss moves from the cross entropy to the overlap of the two distributions, as
    `drafter.train.cross_entropy` has it; 0: never. `target_temperature`: of the backbone's distribution. `prompt_rows`:
    the share of positions in prompts that are trained on.
    """

    steps: int = 4
    deeper: float = 0.25
    decay: float = 0.8
    feature_weight: float = 0.3
    soft: bool = True
    later: str = LATER[0]
    overlap: float = 0.0
    target_temperature: float = 1.0
    prompt_rows: float = 1.0

    def __post_init__(self) -> None:
        assert self.later in LATER
        if not 0 <= self.prompt_rows <= 1:
            raise ValueError(f"the share of positions in prompts must be from 0 to 1, not {self.prompt_rows:g}")
        if not self.soft and (self.overlap or self.target_temperature != 1):
            raise ValueError("hard targets are no distribution: they have no overlap and no temperature")


@dataclass(frozen=True)
class TrainerSettings:
    """Say how to train.

    `batch_tokens` make a step, about `pass_tokens` of them a pass. `matrix_rate`: the learning rate of the matrices
    that Muon moves, in units of `learning_rate`; 0: AdamW moves everything. `bfloat16`: whether matrix products are
    bfloat16, for processors that are faster that way. `quantised`: the share of the run, at its end, in which passes
    compute with the weights as they will be saved, and the weights themselves are moved by those passes' gradients.
    """

    recipe: Recipe = field(default_factory=Recipe)
    learning_rate: float = 1e-3
    matrix_rate: float = 3.0
    batch_tokens: int = 2048
    pass_tokens: int = 1024
    warmup: int = 20
    decay: float = 0.2
    clip: float = 1.0
    weight_decay: float = 0.0
    bfloat16: bool = field(default_factory=fast_bfloat16)
    seed: int = 0
    quantised: float = 0.3


ADAPTING_RATE = 3e-4  # learning rate where a head that is in use is adapted to a little text (`--from-use`)


@dataclass(frozen=True)
class TimeBudget:
    """Say how long to train: `minutes` in all, of which `collecting` is the share that goes into data, or `steps` of
    training.

    `tokens`: of the training set, at most; with `steps` also at least. `evaluate_minutes`: between evaluations.
    """

    minutes: float | None = None
    steps: int | None = None
    tokens: int | None = None
    collecting: float = 0.55
    evaluate_minutes: float = 4.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("say how long to train: either minutes or steps")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"the minutes to train must be more than 0, not {self.minutes:g}")
        if self.steps is not None and self.tokens is None:
            raise ValueError("a number of steps needs a size of the training set too, in tokens")
