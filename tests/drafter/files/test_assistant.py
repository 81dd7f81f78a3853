"""An assistant that is trained here is one that transformers loads, and it drafts the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from drafter import load_drafter
from drafter.files.assistant import ABOUT_FILE
from drafter.files.formats import form_for
from drafter.settings import Shape, TimeBudget
from tests.support.tiny import prompt, tiny_model
from tests.support.tiny_assistant import backbone, prefilled, proposed, transformers_assistant
from tests.support.tiny_run import make_shards_small, training_run

LENGTH = 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards_small(monkeypatch)


@pytest.mark.parametrize("family", ["gemma4_unified", "gemma4"])
def test_transformers_drafts_the_same_with_what_was_trained_here(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(training_run(tmp_path, family, budget=TimeBudget(steps=20, tokens=1000)).run())
    theirs = transformers_assistant(tmp_path, family)
    assert theirs.generation_config.num_assistant_tokens == LENGTH
    rounds: list[tuple[Tensor, Tensor, bool]] = []
    their_candidates = SinglePositionMultiTokenCandidateGenerator.get_candidates

    def candidates(self: Any, input_ids: Tensor, **rest: Any) -> Any:
        found = their_candidates(self, input_ids, **rest)
        if not rest["is_first_iteration"]:
            before = 0 if not rounds else len(rounds[-1][1])
            rejected = bool(rounds) and rest["n_last_matches"] < before
            rounds.append((input_ids[0].clone(), found[0][0, input_ids.shape[1] :].clone(), rejected))
        return found

    monkeypatch.setattr(SinglePositionMultiTokenCandidateGenerator, "get_candidates", candidates)
    drafter, compared, accepted = load_drafter(tmp_path), 0, 0
    drafter.bind(backbone(family))
    for seed in range(6):
        rounds.clear()
        text = tiny_model(family).generate(prompt(6 + seed, seed)[:1], assistant_model=theirs, max_new_tokens=40)
        plain = tiny_model(family).generate(prompt(6 + seed, seed)[:1], max_new_tokens=40)
        assert torch.equal(text, plain)
        for i, (ids, draft, rejected) in enumerate(rounds):
            if not rejected and len(draft):
                cache, states = prefilled(backbone(family), ids[:-1])
                assert list(proposed(drafter, cache, ids, states, len(draft)).tokens) == draft.tolist()
                compared, accepted = compared + 1, accepted + (i > 0)
    assert compared >= 6 and accepted >= 1, "no round came after one in which every draft was right"


def test_the_folder_says_how_it_was_made(tmp_path: Path) -> None:
    run = training_run(tmp_path, "gemma4_unified", budget=TimeBudget(steps=2, tokens=300))
    list(run.run())
    about = json.loads((tmp_path / ABOUT_FILE).read_text())
    assert about["backbone"] == {"fingerprint": run.backbone.fingerprint, "name": "tiny"}
    assert about["provenance"]["trained"]["steps"] in (0, 2) and about["provenance"]["set"]["shards"] >= 1
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.backbone_hidden_size == 64
    assert config.text_config.layer_types == [
        "sliding_attention",
        "full_attention",
    ]


def test_shapes_that_an_assistant_cannot_have() -> None:
    decoder, config = backbone("gemma4_unified"), tiny_model("gemma4_unified").config.get_text_config()
    with pytest.raises(ValueError, match="no bigram bias"):
        form_for(Shape(bigram=4), decoder.spec, config)
    form = form_for(Shape(depth=3, width=32), decoder.spec, config)
    kinds = [layer.kind for layer in form.spec(decoder.spec).text.layers]
    assert kinds == ["sliding_attention", "sliding_attention", "full_attention"] and form.draft_vocab == 0
