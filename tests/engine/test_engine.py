"""The loop: the same text and the same state whatever is drafted, on every family, past the sliding window."""

from __future__ import annotations

import pytest
import torch

from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Drafter, FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.event import Event
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.states import States
from tests.support.decoding import decode, never
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import FAMILIES, VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_decoder import quantised

NEW = 5 * WINDOW


def run(
    decoder: Decoder,
    drafter: Drafter,
    length: int | None,
    *,
    seed: int | None = None,
    new: int = NEW,
    stop_at: int | None = None,
    prompt_length: int = 12,
) -> tuple[list[int], GenerationStats]:
    ids = prompt(prompt_length)[0]
    emitted: list[int] = []

    def on_event(number: int, event: Event) -> None:
        assert event.logits is not None
        assert event.logits.shape == (len(event.tokens), VOCAB)
        emitted.extend(event.tokens)

    def stop(tokens: torch.Tensor, choice: Choice) -> bool:
        assert int(tokens[-1]) == choice.token
        return choice.token == stop_at and len(tokens) > prompt_length + 20

    stats = GenerationStats()
    lengths = AdaptiveLength() if length is None else FixedLength(length)
    request = Request(ids, prompt_length + new, Sampler(seed=seed), stop)
    ((_, row, _),) = decode(decoder, drafter, lengths, [request], stats, on_event=on_event)
    tokens = row.tolist()
    assert tokens == ids.tolist() + emitted
    assert stats.emitted == len(emitted) == 1 + stats.rounds + stats.accepted
    return tokens, stats


def dense_or_in_blocks(family: str, seed: int | None) -> Decoder:
    """The tiny model, whose passes go op by op; for sampled text in blocks, where a pass is one native call."""
    return decoder_of(tiny_model(family)) if seed is None else quantised(family, "int8")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [None, 4], ids=["greedy", "sampled"])
def test_drafts_never_change_the_text(family: str, seed: int | None) -> None:
    decoder = dense_or_in_blocks(family, seed)
    plain, stats = run(decoder, NoDraft(), 0, seed=seed)
    assert len(plain) == 12 + NEW
    assert stats.drafted == 0
    for name, script in SCRIPTS.items():
        for length in (1, 4, 16):
            text, stats = run(decoder, ScriptedDrafter(plain, script, VOCAB), length, seed=seed)
            assert text == plain, f"{name}, {length} drafts a round"
            assert stats.drafted > 0
    assert run(decoder, SuffixDrafter(), 8, seed=seed)[0] == plain
    assert run(decoder, SuffixDrafter(), None, seed=seed)[0] == plain


def test_what_is_accepted_is_counted() -> None:
    decoder = decoder_of(tiny_model("llama"))
    plain, _ = run(decoder, NoDraft(), 0)
    _, right = run(decoder, ScriptedDrafter(plain, SCRIPTS["all right"], VOCAB), 4, new=21)
    assert (right.rounds, right.drafted, right.accepted) == (4, 16, 16)
    assert right.accepted_per_position == right.drafted_per_position == [4, 4, 4, 4]
    assert right.mean_acceptance_length == 5
    _, half = run(decoder, ScriptedDrafter(plain, SCRIPTS["half right"], VOCAB), 4, new=22)
    assert (half.rounds, half.accepted) == (7, 14)
    assert half.accepted_per_position == [7, 7, 0, 0]
    assert half.mean_acceptance_length == 3
    assert half.draft_sources == {"scripted": [half.drafted, 14]}
    _, wrong = run(decoder, ScriptedDrafter(plain, SCRIPTS["all wrong"], VOCAB), 4)
    assert wrong.acceptance_rate == 0
    assert wrong.mean_acceptance_length == 1


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6])
def test_the_token_budget_is_exact_and_drafts_do_not_outrun_it(new: int) -> None:
    decoder = decoder_of(tiny_model("gemma4"))
    plain, _ = run(decoder, NoDraft(), 0)
    drafter = ScriptedDrafter(plain, SCRIPTS["all right"], VOCAB)
    text, stats = run(decoder, drafter, 4, new=new)
    assert text == plain[: 12 + new]
    assert stats.drafted <= new - 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stop_inside_a_draft_cuts_there(script: str) -> None:
    decoder = decoder_of(tiny_model("gemma3"))
    plain, _ = run(decoder, NoDraft(), 0)
    stop_at = plain[12 + 33]
    expected, _ = run(decoder, NoDraft(), 0, stop_at=stop_at)
    assert len(expected) < len(plain)
    text, stats = run(decoder, ScriptedDrafter(plain, SCRIPTS[script], VOCAB), 16, stop_at=stop_at)
    assert text == expected
    assert stats.emitted == len(expected) - 12  # what was cut is not counted


def test_a_prompt_of_many_passes() -> None:
    decoder = decoder_of(tiny_model("gemma4_unified"))
    plain, _ = run(decoder, NoDraft(), 0, prompt_length=200)
    text, _ = run(decoder, ScriptedDrafter(plain, SCRIPTS["in turn"], VOCAB), 16, prompt_length=200)
    assert text == plain


def test_a_prompt_of_one_token() -> None:
    decoder = decoder_of(tiny_model("llama"))
    plain, _ = run(decoder, NoDraft(), 0, prompt_length=1)
    assert run(decoder, SuffixDrafter(), 8, prompt_length=1)[0] == plain


@pytest.mark.parametrize("bits", ["int4", "int8"])
@pytest.mark.parametrize("seed", [None, 7], ids=["greedy", "sampled"])
def test_quantised_weights_are_exact_too(bits: str, seed: int | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    import specdec

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("gemma4").save_pretrained(folder)
    decoder = specdec.load(folder, quantize=bits, device="cpu").decoder
    plain, _ = run(decoder, NoDraft(), 0, seed=seed)
    for script in SCRIPTS.values():
        assert run(decoder, ScriptedDrafter(plain, script, VOCAB), 7, seed=seed)[0] == plain


def test_an_interrupt_leaves_the_statistics_and_the_model_usable() -> None:
    decoder = decoder_of(tiny_model("llama"))
    plain, _ = run(decoder, NoDraft(), 0)

    class Interrupted(ScriptedDrafter):
        def propose(self, tokens, states, k):
            if len(tokens) > 40:
                raise KeyboardInterrupt
            return super().propose(tokens, states, k)

    stats = GenerationStats()
    request = Request(prompt(12)[0], 90, Sampler(), never)
    with pytest.raises(KeyboardInterrupt):
        list(decode(decoder, Interrupted(plain, SCRIPTS["all right"], VOCAB), FixedLength(3), [request], stats))
    assert 28 < stats.emitted < 40
    assert run(decoder, NoDraft(), 0)[0] == plain


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gemma4-e2b", "gemma4-moe"])
@pytest.mark.parametrize("seed", [None, 9], ids=["greedy", "sampled"])
def test_texts_that_are_decoded_together_are_what_they_are_alone(family: str, seed: int | None) -> None:
    decoder = dense_or_in_blocks(family, seed)
    prompts = [prompt(length, seed=length)[0] for length in (12, 3, 150, 1, WINDOW, 64, 65)]
    budgets = (NEW, 1, 40, 3 * WINDOW, 2, NEW // 2, 17)
    stop_at = int(prompts[0][0])  # some of the texts meet it

    def decoded(together: int, drafter: Drafter) -> tuple[dict[int, list[int]], list[list[int]], GenerationStats]:
        heard: list[list[int]] = [[] for _ in prompts]
        requests = [
            Request(
                ids,
                len(ids) + new,
                Sampler(seed=None if seed is None else seed + i),
                lambda tokens, choice: choice.token == stop_at,
            )
            for i, (ids, new) in enumerate(zip(prompts, budgets, strict=True))
        ]
        stats = GenerationStats()
        ended = {}

        def on_event(number: int, event: Event) -> None:
            heard[number].extend(event.tokens)

        ends = decode(decoder, drafter, FixedLength(3), iter(requests), stats, together, on_event=on_event)
        for i, row, _ in ends:
            assert i not in ended
            ended[i] = row.tolist()
        return ended, heard, stats

    alone, _, _ = decoded(1, NoDraft())
    assert {len(alone[i]) - len(ids) for i, ids in enumerate(prompts)} >= {1, 2}
    for together in (1, 2, 3, len(prompts), 50):
        texts, heard, stats = decoded(together, SuffixDrafter())
        assert texts == alone, f"{together} together"
        assert all(texts[i] == ids.tolist() + heard[i] for i, ids in enumerate(prompts))
        assert stats.prompts == len(prompts)
        assert stats.prompt_tokens == sum(map(len, prompts))
        assert stats.emitted == sum(map(len, heard)) == stats.prompts + stats.rounds + stats.accepted


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("length", [0, 5])
def test_a_watcher_hears_the_state_of_every_committed_token(together: int, length: int) -> None:
    decoder = decoder_of(tiny_model("gemma4"))
    prompts = [prompt(n, seed=n)[0] for n in (150, 9, 64)]
    heard: list[list[States]] = [[] for _ in prompts]
    requests = [
        Request(ids, len(ids) + 30, Sampler(), never, on_states=heard[i].append) for i, ids in enumerate(prompts)
    ]
    for i, row, cache in decode(decoder, SuffixDrafter(), FixedLength(length), requests, GenerationStats(), together):
        assert cache.length == len(row) - 1
        again = decoder.new_cache()
        for part, state in zip(row[:-1].split(1), States.cat(heard[i]).last.split(1), strict=True):
            assert torch.equal(decoder.forward(part, again).last, state)
            again.commit(1)
