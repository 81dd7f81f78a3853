"""A model that drafts: the plain text whatever it proposes, and all of it where it is the backbone itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.draft_model.draft_model import DraftModel, DraftModelProposer
from specdec.drafting.protocol import Draft, Drafter, FixedLength
from specdec.engine.sampling import Noise, Sampler, Warping
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.hf import SpecdecForCausalLM
from specdec.model.decoder import Decoder
from specdec.model.states import States
from tests.support.decoding import alone, decode, never, request
from tests.support.drafts.tiny_draft_model import draft_model
from tests.support.tiny import VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_decoder import of

NEW = 4 * WINDOW
NEARLY = 0.3  # of the output matrix's deviation: some drafts are right, some in part, some wrong


def text(decoder: Decoder, drafter: Drafter, length: int | None, one: Request) -> tuple[list[int], GenerationStats]:
    stats = GenerationStats()
    lengths = AdaptiveLength() if length is None else FixedLength(length)
    ((_, row, _),) = decode(decoder, drafter, lengths, [one], stats)
    return row.tolist(), stats


def sampled(ids: Tensor, new: int, warping: Warping, seed: int = 4) -> Request:
    """A request that samples as transformers' warpers of these settings do."""

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        scores = scores / warping.temperature
        kept = warping.kept(scores[0]) if warping.truncates else torch.arange(VOCAB)
        masked = torch.full_like(scores, -torch.inf)
        masked[0, kept] = scores[0, kept]
        return masked

    return Request(ids, len(ids) + new, Sampler(process, seed, warping=warping), never)


@pytest.mark.parametrize("kept", [torch.float32, torch.int8])
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize(
    ("family", "drafts"),
    [("gemma4_unified", "gemma4-e2b"), ("gemma4", "gemma3"), ("llama", "qwen2-sliding")],
)
def test_text_is_the_plain_text_past_the_window(family: str, drafts: str, seed: int | None, kept: torch.dtype) -> None:
    decoder, one, drafter = of(family, kept, "int8"), request(prompt(12)[0], NEW, seed), draft_model(drafts)
    plain = alone(decoder, one)
    for length in (1, 3, 8, None):
        drafted, stats = text(decoder, drafter, length, one)
        assert drafted == plain
        assert list(stats.draft_sources) == ["model"] or length is None  # which depends on what this machine takes


@pytest.mark.parametrize(
    ("kept", "storage"), [(torch.float32, "int8"), (torch.int8, "int8"), (torch.bfloat16, None)], ids=str
)
@pytest.mark.parametrize("warping", [None, Warping(), Warping(0.7, top_k=20), Warping(1.3, top_p=0.8, min_p=0.01)])
@pytest.mark.parametrize("family", ["gemma4_unified", "llama"])
def test_a_model_that_drafts_for_itself_is_always_right(
    family: str, warping: Warping | None, kept: torch.dtype, storage: str | None
) -> None:
    decoder, ids = of(family, kept, storage), prompt(12)[0]
    one = request(ids, NEW) if warping is None else sampled(ids, NEW, warping)
    drafted, stats = text(decoder, draft_model(family, storage=storage), 4, one)
    assert drafted == alone(decoder, one)
    assert stats.accepted == stats.drafted == stats.draft_sources["model"][1] > NEW / 2


class Recorded(DraftModel):
    """Remembers what was asked and answered, of the last text."""

    rounds: list[tuple[list[int], Draft]]

    def start(self, cache: KVCache, noise: Noise | None = None) -> RecordedDrafts:
        self.rounds = []
        return RecordedDrafts(super().start(cache, noise), self.rounds)


class RecordedDrafts:
    name, max_draft = DraftModel.name, DraftModel.max_draft

    def __init__(self, proposer: DraftModelProposer, rounds: list[tuple[list[int], Draft]]) -> None:
        self.proposer, self.rounds = proposer, rounds

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        draft = self.proposer.propose(tokens, states, k)
        self.rounds.append((list(tokens), draft))
        return draft


@pytest.mark.parametrize("warping", [None, Warping(0.8, top_k=30)])
@pytest.mark.parametrize("family", ["gemma4_unified", "gemma3"])
def test_every_draft_is_that_of_a_fresh_cache(family: str, warping: Warping | None) -> None:
    """None, some and all of a draft accepted: what was rejected leaves nothing in the model's cache."""
    decoder, ids = of(family, None, "int8"), prompt(12)[0]
    made = draft_model(family, unlike=NEARLY)
    drafter = Recorded(made.path, made.spec, made._build)
    one = request(ids, 2 * NEW) if warping is None else sampled(ids, 2 * NEW, warping)
    drafted, stats = text(decoder, drafter, 4, one)
    assert drafted == alone(decoder, one)
    reached = stats.accepted_per_position
    assert stats.rounds > reached[0] > reached[3] > 0, "no round with none, with some or with all accepted"
    states = States(torch.empty(0, dtype=torch.float32))
    for tokens, draft in drafter.rounds[::2]:
        fresh = DraftModel.start(drafter, decoder.new_cache(), one.sampler.noise)
        assert fresh.propose(tokens, states, len(draft.tokens)) == draft


def test_a_text_that_ends_inside_a_draft_and_one_with_a_token_left() -> None:
    decoder, ids = of("gemma4_unified", None, "int8"), prompt(12)[0]
    plain = alone(decoder, request(ids, NEW))
    end = plain[12 + 21]  # of the fifth draft of four tokens

    def stop(tokens: Tensor, choice: Choice) -> bool:
        return choice.token == end and len(tokens) > 12 + 17

    one = Request(ids, 12 + NEW, Sampler(), stop)
    drafted, stats = text(decoder, draft_model("gemma4_unified"), 4, one)
    assert drafted == alone(decoder, one) and drafted[-1] == end and len(drafted) < len(plain)
    for new in (1, 2, 3, 6):
        drafted, stats = text(decoder, draft_model("gemma4_unified"), 4, request(ids, new))
        assert drafted == plain[: 12 + new]
        assert stats.drafted == stats.accepted == new - 1 - stats.rounds


def test_texts_side_by_side_have_caches_of_their_own() -> None:
    decoder, drafter = of("gemma3", None, "int8"), draft_model("gemma3")
    asked = [request(prompt(n, seed=n)[0], NEW, n if n % 2 else None) for n in (9, 30, 17, 5)]
    stats = GenerationStats()
    rows = {number: row.tolist() for number, row, _ in decode(decoder, drafter, FixedLength(3), asked, stats, 3)}
    assert [rows[i] for i in range(len(asked))] == [alone(decoder, one) for one in asked]
    assert stats.accepted == stats.drafted > 2 * NEW


def test_beside_suffix_matches_both_draft() -> None:
    decoder, drafter = of("llama", None, "int8"), CompositeDrafter(draft_model("llama", unlike=NEARLY))
    ids = prompt(10)[0].repeat(4)
    drafted, stats = text(decoder, drafter, 5, request(ids, 2 * NEW))
    assert drafter.name == "suffix+model" and drafter.max_draft == 16
    assert drafted == alone(decoder, request(ids, 2 * NEW))
    assert {"suffix", "model"} <= set(stats.draft_sources)


def test_a_text_outgrows_the_model_that_drafts() -> None:
    decoder, drafter = of("gemma3", None, "int8"), draft_model("gemma3")
    drafter.bind(decoder)
    short = type(drafter.spec)(**{**vars(drafter.spec), "max_positions": 40})
    drafter.decoder.spec = short
    drafted, stats = text(decoder, drafter, 4, request(prompt(12)[0], NEW))
    assert drafted == alone(decoder, request(prompt(12)[0], NEW))
    # The last row that it can read is the 40th, for the 41st token; the 42nd is the backbone's own.
    assert stats.drafted == stats.accepted == 42 - 13 - (stats.rounds - stats.draft_lengths[0])


def generate(model: SpecdecForCausalLM, ids: Tensor, **how: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 30, "do_sample": True, "top_k": 0, "eos_token_id": None, "seed": 2, **how}
    found: list[list[int]] = model.generate(ids, **settings).tolist()
    return found


def test_batches_and_transformers_warpers() -> None:
    theirs, decoder = tiny_model("gemma4_unified"), of("gemma4_unified", None, "int8")
    model = SpecdecForCausalLM(decoder, theirs.config, theirs.generation_config, draft_model("gemma4_unified"))
    ids = torch.cat([prompt(20, seed=n) for n in range(2)])
    for how in ({}, {"temperature": 0.6, "top_k": 9}, {"top_p": 0.7}, {"min_p": 0.02}, {"do_sample": False}):
        plain = generate(model, ids, speculation=False, **how)
        assert generate(model, ids, draft_length=4, **how) == plain
        assert model.last_stats.accepted == model.last_stats.drafted > 30
        assert generate(model, ids, **how) == plain, "adaptive lengths"
