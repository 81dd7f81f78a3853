"""The variants of the training recipe that `eval.ablations` compares, some of them mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drafter.data.dataset import BEGINNING, Dataset, Position
from drafter.data.features import AttentionStates, Features
from drafter.settings import Shape, TrainerSettings
from drafter.train.model import Network, Sight


class SeesItself(Network):
    """Make the mask mistake: row p also sees key p, which does not exist yet when drafts are made."""

    def sight(self, texts: Sequence[tuple[Tensor, Mapping[int, AttentionStates]]]) -> Sight:
        """Return the network's sight of `texts` (rows and K/V of each), with key p added to the mask of row p."""
        right = super().sight(texts)
        views = []
        for view, (rows, _) in zip(right.texts, texts, strict=True):
            own = {
                kind: mask.index_put(
                    (torch.arange(len(rows), dtype=torch.int64), rows), torch.tensor(True, dtype=torch.bool)
                )
                for kind, mask in view.masks.items()
            }
            views.append(view._replace(masks=own))
        return right._replace(texts=views)


class Shifted(Dataset):
    """Make the shift mistake: row p is trained with the state of token p, which is not known when drafts are made."""

    def texts(
        self, seed: int, start: Position = BEGINNING, epochs: int | None = None
    ) -> Iterator[tuple[Position, Features]]:
        """Yield the texts of the set with their hidden states moved by one: position p gets the state of position p +
        1."""
        for position, text in super().texts(seed, start, epochs):
            states = torch.cat((text.hidden[1:], text.hidden[-1:]))
            yield position, replace(text, hidden=states)


BASE = Shape()


@dataclass(frozen=True)
class Variant:
    """Describe one change; all else is as the recipe has it."""

    name: str
    shape: Shape = BASE
    settings: Callable[[TrainerSettings], TrainerSettings] = lambda base: base
    network: type[Network] = Network
    dataset: type[Dataset] = Dataset
    fitted: bool = True  # whether pre_projection begins as the least-squares solution
    fused: slice | None = None  # which of the other layers' states that the set has join the last one

    def of(self, aux_layers: tuple[int, ...]) -> Variant:
        """Return this variant for a set that has the states of `aux_layers`, in ascending order."""
        return (
            self if self.fused is None else replace(self, shape=replace(self.shape, aux_layers=aux_layers[self.fused]))
        )


def _recipe(**changes: Any) -> Callable[[TrainerSettings], TrainerSettings]:
    return lambda base: replace(base, recipe=replace(base.recipe, **changes))


VARIANTS = (
    Variant("base"),
    Variant("not fitted: an average of embedding and state", fitted=False),
    Variant("mistake: state of the wrong position", dataset=Shifted),
    Variant("mistake: sees its own key", network=SeesItself),
    Variant("K = 1", settings=_recipe(steps=1)),
    Variant("K = 2", settings=_recipe(steps=2)),
    Variant("all positions unrolled", settings=_recipe(deeper=1.0)),
    Variant("no feature loss", settings=_recipe(feature_weight=0.0)),
    Variant("feature loss x 3", settings=_recipe(feature_weight=1.0)),
    Variant("the model's choices as targets", settings=_recipe(soft=False)),
    Variant("later steps where the own draft is the text", settings=_recipe(later="draft")),
    Variant("later steps by the chance of the draft so far", settings=_recipe(later="chance")),
    Variant("overlap of the distributions, rate 3", settings=_recipe(overlap=3.0)),
    Variant("no rows of prompts", settings=_recipe(prompt_rows=0.0)),
    Variant("a quarter of the rows of prompts", settings=_recipe(prompt_rows=0.25)),
    Variant("targets of temperature 0.5", settings=_recipe(target_temperature=0.5)),
    Variant("targets of temperature 0.8", settings=_recipe(target_temperature=0.8)),
    Variant("one layer", Shape(depth=1)),
    Variant("two layers", Shape(depth=2)),
    Variant("weights never rounded", settings=lambda base: replace(base, quantised=0.0)),
    Variant("weights rounded from the start", settings=lambda base: replace(base, quantised=1.0)),
    Variant("AdamW alone", settings=lambda base: replace(base, matrix_rate=0.0)),
    Variant("half the feed-forward width", Shape(width=768)),
    Variant("draft vocabulary 4,096", Shape(draft_vocab=4096)),
    Variant("draft vocabulary 16,384", Shape(draft_vocab=16384)),
    Variant("bigram bias of rank 256", Shape(bigram=256)),
    Variant("a high layer's state fused", fused=slice(-1, None)),
    Variant("low, middle and high layers' states fused", fused=slice(None)),
)
