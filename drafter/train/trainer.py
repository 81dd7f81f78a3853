"""Training a head: steps over a set of `Features`, and a state that can be put down and taken up again.

What: `Trainer`. A step takes texts until it has `batch_tokens` tokens, adds up their losses, divides by the number of
rows and moves the weights: the matrices of the layers and projections with Muon, all others with AdamW. Under
`torchrun` every process takes every n-th text of the same batch, and the division is by the rows of all processes: n
processes do what one process would. The learning rate rises for `warmup` steps, stays, and falls to zero over the last
`decay` of the run (constant then decay, the schedule that TorchSpec found best). `save` writes everything that the next
step depends on, so a run that was killed and started again ends with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from drafter.data.dataset import BEGINNING, Dataset, Position
from drafter.data.features import Features
from drafter.settings import TrainerSettings
from drafter.train.loss import Candidates, unrolled_loss
from drafter.train.model import Network
from drafter.train.optimizer import Muon, rank_and_count
from specdec.engine.sampling import mix
from specdec.util.atomic import replacing


@dataclass(frozen=True)
class StepReport:
    """Describe one step. `loss` is a row's; `cross_entropy` and `feature` are a drafted token's, without weights.

    `acceptance_length`: 1 + drafts that were right from the first on, per row, teacher-forced.
    """

    step: int
    tokens: int
    loss: float
    cross_entropy: float
    feature: float
    per_position: tuple[float, ...]
    learning_rate: float

    @property
    def acceptance_length(self) -> float:
        """Return 1 plus the accepted shares of all positions: tokens a round, teacher-forced."""
        return 1 + sum(self.per_position)


class Trainer:
    """Train `network` on `dataset`, whose backbone embeds tokens with `embed`."""

    def __init__(
        self,
        network: Network,
        dataset: Dataset,
        embed: Callable[[Tensor], Tensor],
        candidates: Candidates,
        settings: TrainerSettings,
        stored: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        """Begin at the first text of `dataset` and with the weights of `network`, which proposes `candidates`.

        `stored`: gives a tensor of this name as it is once it was saved; None: saving changes none.
        """
        self.stored = stored
        self.network, self.dataset, self.embed, self.candidates = network, dataset, embed, candidates
        self.settings = settings
        self.optimizers = _optimizers(network, settings)
        self.step_number = self.tokens = 0
        self.scale = _scale(dataset)
        self.position = BEGINNING
        self._texts = dataset.texts(settings.seed)
        self._rank, self._ranks = rank_and_count()

    def step(self, progress: float, batch_tokens: int | None = None) -> StepReport:
        """Take one step; `progress` 0..1: how much of the run is done, for the learning rate.

        `batch_tokens`: of this step, if not as many as the settings say.
        """
        rate = self._rate(progress)
        for optimizer, factor in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for options in optimizer.param_groups:
                options["lr"] = factor * rate
        texts = self._batch(batch_tokens or self.settings.batch_tokens)
        steps = self.settings.recipe.steps
        chance = mix(mix(self.settings.seed) ^ self.step_number) >> 1
        # By length, so that all processes have about as much to do; the sums do not depend on the division.
        dealt = sorted(enumerate(texts), key=lambda found: -len(found[1]))[self._rank :: self._ranks]
        mine = [(text, chance ^ number) for number, text in dealt]
        # loss, cross entropy, feature loss, rows, rows that went on, those right
        sums = torch.zeros(5 + steps, dtype=torch.float32)
        with self._weights_as_stored(progress):
            for group, seeds in _groups(mine, self.settings.pass_tokens):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
                    found = unrolled_loss(
                        self.network, self.embed, group, self.scale, self.candidates, self.settings.recipe, seeds
                    )
                torch.autograd.backward(found.loss)
                losses = torch.stack((found.loss.detach(), found.cross_entropy, found.feature))
                counts = torch.tensor((found.rows, len(found.right)), dtype=torch.float32)
                sums += torch.cat((losses, counts, found.right.sum(dim=0)))
        self._add_up(sums)
        loss, cross_entropy, feature, count, deeper, *right = sums.tolist()
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        self.step_number += 1
        tokens = sum(map(len, texts))
        self.tokens += tokens
        per_position = tuple(n / deeper for n in right)
        drafts = count * steps
        return StepReport(
            self.step_number, tokens, loss / count, cross_entropy / drafts, feature / drafts, per_position, rate
        )

    @contextmanager
    def _weights_as_stored(self, progress: float) -> Iterator[None]:
        """Let passes compute with the weights as they will be saved, where it is time for that.

        Gradients of the rounded weights are taken for those of the weights themselves (the straight-through estimator,
        Bengio, Léonard, Courville, arXiv 1308.3432), so that training ends where rounding costs least.
        """
        if self.stored is None or progress < 1 - self.settings.quantised:
            yield
            return
        own = {name: parameter.detach().clone() for name, parameter in self.network.by_name()}
        try:
            with torch.no_grad():
                for name, parameter in self.network.by_name():
                    parameter.copy_(self.stored(name, own[name]))
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.network.by_name():
                    parameter.copy_(own[name])

    def _batch(self, tokens: int) -> list[Features]:
        """Return the next texts, `tokens` tokens of them: the same on every process, which takes its share of them."""
        texts: list[Features] = []
        first = self.position.epoch
        while sum(map(len, texts)) < tokens:
            self.position, text = next(self._texts)
            if len(text) > self.settings.recipe.steps:
                texts.append(text)
            elif not texts and self.position.epoch > first + 1:
                raise ValueError(
                    f"{self.dataset.folder}: every text is shorter than the {self.settings.recipe.steps} tokens of a "
                    "draft; collect longer answers, or train shorter drafts"
                )
        return texts

    def _add_up(self, sums: Tensor) -> None:
        """Add `sums` and the gradients up over all processes, in place, to the sums that one process alone would
        have."""
        if self._ranks == 1:
            return
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:  # this process had no text
                p.grad = torch.zeros_like(p)
        flat = torch.cat([sums, *(p.grad.flatten() for p in parameters if p.grad is not None)])
        distributed.all_reduce(flat)
        sums.copy_(flat[: len(sums)])
        pieces = torch.split(flat[len(sums) :], [p.numel() for p in parameters])
        for p, piece in zip(parameters, pieces, strict=True):
            assert p.grad is not None
            p.grad.copy_(piece.view_as(p))

    def save(self, path: Path, more: dict[str, Any] | None = None) -> None:
        """Save everything that the next step depends on, and `more`, in one file, all or nothing."""
        state = {
            "network": self.network.tensors(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "step": self.step_number,
            "tokens": self.tokens,
            "scale": self.scale,
            "position": asdict(self.position),
            "settings": asdict(self.settings),
            "candidates": self.candidates.ids,
            "more": more or {},
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path) -> dict[str, Any]:
        """Go on from a file that `save` wrote; return its `more`.

        Raises:
            ValueError: the file is damaged, or was written by a run with other settings, other candidates or another
                head.
        """
        try:
            state = torch.load(path, weights_only=True)
            theirs, candidates = state["settings"], state["candidates"]
        except Exception as error:  # torch and pickle have many of their own
            raise ValueError(f"{path}: a damaged checkpoint ({error}); delete it to begin anew") from error
        usual = asdict(TrainerSettings())  # what a file of earlier days does not say is as it was then
        theirs = {**usual, **theirs, "recipe": {**usual["recipe"], **theirs["recipe"]}}
        mine = asdict(self.settings)
        if changed := sorted(name for name in mine if mine[name] != theirs.get(name)):
            changed = [f"{name} (or order)" if name == "seed" else name for name in changed]
            raise ValueError(f"{path}: begun with another {', '.join(changed)}; use those, or delete it to begin anew")
        if {n: t.shape for n, t in state["network"].items()} != {n: t.shape for n, t in self.network.tensors().items()}:
            raise ValueError(f"{path}: the checkpoint of a head of another shape; delete it to begin anew")
        if not torch.equal(candidates, self.candidates.ids):
            raise ValueError(
                f"{path}: the training set has changed since, and its most frequent tokens with it, which the head's "
                "rows stand for; put the set back as it was, or delete the checkpoint to begin anew"
            )
        with torch.no_grad():
            for name, tensor in state["network"].items():
                self.network[name].copy_(tensor)
        for (optimizer, _), theirs in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(theirs)
        self.step_number, self.tokens, self.scale = state["step"], state["tokens"], state["scale"]
        self.position = Position(**state["position"])
        self._texts = self.dataset.texts(self.settings.seed, self.position)
        return dict(state["more"])

    def _rate(self, progress: float) -> float:
        s = self.settings
        rising = min(1.0, (self.step_number + 1) / max(1, s.warmup))
        falling = min(1.0, max(0.0, 1.0 - progress) / s.decay) if s.decay else 1.0
        return s.learning_rate * rising * falling


def _optimizers(network: Network, settings: TrainerSettings) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return the optimizers that move the weights, each with its learning rate in units of `settings.learning_rate`.

    Muon (https://kellerjordan.github.io/posts/muon/, its step sized as in arXiv 2502.16982) gives every direction of a
    matrix the same step. Muon is for matrices between hidden states: rows that stand for tokens come up too unevenly.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in network.by_name():
        hidden = parameter.dim() == 2 and not name.startswith(("embed_tokens", "bigram"))
        (matrices if hidden and settings.matrix_rate else others).append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    found: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(others, lr=rate, weight_decay=decay, betas=(0.9, 0.95), fused=True), 1.0)
    ]
    if matrices:
        products = torch.bfloat16 if settings.bfloat16 else torch.float32
        muon = Muon(matrices, lr=rate, weight_decay=decay, products=products)
        found.append((muon, settings.matrix_rate))
    return found


def _groups(texts: Sequence[tuple[Features, int]], tokens: int) -> Iterator[tuple[list[Features], list[int]]]:
    """Yield `texts` and their seeds in groups of about `tokens` tokens."""
    group: list[Features] = []
    seeds: list[int] = []
    for text, seed in texts:
        group.append(text)
        seeds.append(seed)
        if sum(map(len, group)) >= tokens:
            yield group, seeds
            group, seeds = [], []
    if group:
        yield group, seeds


def _scale(dataset: Dataset) -> float:
    """Return the standard deviation of a hidden state's entries, from the first text of the set."""
    _, text = next(dataset.texts(seed=0))
    return float(text.hidden.float().std())
