"""Names and counts for monitoring, and the callback of every round."""

from __future__ import annotations

import re

import torch

from specdec import Round
from specdec.engine.stats import GenerationStats
from specdec.engine.telemetry import prometheus, speculative_decoding
from specdec.hf import SpecdecForCausalLM, decoder_of, speculative
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import VOCAB, prompt, tiny_model


def counted(*rounds: tuple[int, int]) -> GenerationStats:
    stats = GenerationStats()
    for drafted, accepted in rounds:
        stats.count_round(Round(("mtp",) * drafted, accepted, accepted + 1, 0.25, 0.5, 0.125))
    return stats


def test_vllms_names_count_rounds_with_a_draft() -> None:
    found = speculative_decoding(counted((3, 3), (3, 1), (0, 0), (2, 0), (3, 1)))
    assert found == {
        "mean_acceptance_length": 1 + 5 / 4,
        "draft_acceptance_rate": 5 / 11,
        "acceptance_histogram": [1, 2, 0, 1],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 5,
        "num_draft_tokens": 11,
        "num_spec_tokens": 3,
    }
    nothing = speculative_decoding(GenerationStats())
    assert nothing["mean_acceptance_length"] == 1.0 and nothing["acceptance_histogram"] == [0]


def test_prometheus_text_is_well_formed() -> None:
    text = prometheus(counted((3, 2), (0, 0)), 'a "model"\\of\nmine')
    assert text.endswith("\n") and '\\"model\\"\\\\of\\nmine' in text
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    pattern = re.compile(r'specdec:[a-z_]+\{model_name="(?:[^"\\]|\\.)*"(?:,[a-z]+="\w+")?\} [\d.]+')
    assert all(pattern.fullmatch(line) for line in samples)
    assert sum("num_drafts_total{" in line and line.endswith(" 1") for line in samples) == 1
    assert [line[-1] for line in samples if "per_pos_total{" in line] == ["1", "1", "0"]
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert types == list(dict.fromkeys(line.partition("{")[0] for line in samples)), (
        "every name has its type, before it"
    )


def test_every_round_is_told_and_adds_up() -> None:
    hf = tiny_model("gemma3")
    model = SpecdecForCausalLM(
        decoder_of(hf), hf.config, hf.generation_config, drafter=ScriptedDrafter([], SCRIPTS["all right"], VOCAB)
    )
    ids = prompt(20)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, speculation=False)
    rounds: list[Round] = []
    for other in (False, True):
        drafter = ScriptedDrafter(plain[0].tolist(), SCRIPTS["all right"], VOCAB)
        rounds.clear()
        options = {"max_new_tokens": 30, "do_sample": False, "drafter": drafter, "on_round": rounds.append}
        if other:
            text = hf.generate(ids, custom_generate=speculative, draft_length=3, **options)
        else:
            text = model.generate(ids, draft_length=3, **options)
        stats = (hf if other else model).last_stats
        assert torch.equal(text, plain)
        assert len(rounds) == stats.rounds > 5
        assert sum(r.emitted for r in rounds) == stats.emitted - 1 == 29
        assert sum(r.accepted for r in rounds) == stats.accepted
        assert sum(len(r.sources) for r in rounds) == stats.drafted
        assert sum(r.verify_seconds for r in rounds) == stats.seconds["verify"]
        assert sum(r.draft_seconds for r in rounds) <= stats.seconds["draft"]
