"""Modes: what words stand for, what each of ours drafts, and engines that are opened and closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from eval.bench import modes as module
from eval.bench.engines import EngineTiming, Sampling
from eval.bench.modes import Ours, Wrong, check_possible, open_modes, sampling_of
from eval.cli.names import NGRAM, expand_modes
from eval.cli.options import GenerationSettings
from eval.cli.session import Session, open_session
from specdec.drafting.composite import CompositeDrafter
from specdec.engine.stats import Round
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import VOCAB

IDS = torch.tensor([[5, 6, 7] * 9])


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=30))


def test_words_stand_for_modes_and_plain_comes_first() -> None:
    assert expand_modes([]) == ["plain"]
    assert expand_modes(["adaptive", "plain", "adaptive"]) == ["plain", "adaptive"]
    assert expand_modes(["fixed", "k12"]) == ["plain", "k1", "k2", "k3", "k4", "k5", "k6", "k12"]
    assert expand_modes(["llama.cpp", "llama.cpp-ngram"]) == [
        "plain",
        "llama.cpp",
        *(f"llama.cpp-{kind}" for kind in NGRAM),
    ]
    for word in ("k", "k-1", "best", ""):
        with pytest.raises(ValueError, match=r"there is none\..*Choose from plain, adaptive"):
            expand_modes([word])
    with pytest.raises(ValueError, match=r"--modes adaptve: there is none\. Did you mean adaptive\?"):
        expand_modes(["adaptve"])


def test_what_cannot_be_compared_is_said_before_anything_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GenerationSettings(model=str(folder), device="cpu")
    check_possible(["plain", "k2", "suffix"], settings)
    with pytest.raises(ValueError, match=r"is none: name such a file"):
        check_possible(["plain", "transformers-lookup"], settings)
    monkeypatch.setattr("eval.bench.engines.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"xllamacpp: pip install -c constraints.txt -e '.\[bench\]'"):
        check_possible(["llama.cpp-ngram-mod"], settings)


def test_other_engines_are_compared_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    monkeypatch.setattr("eval.bench.engines.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_possible(["transformers"], GenerationSettings(model=str(file)))  # on a Mac too the CPU is what nobody names
    with pytest.raises(ValueError, match="add --device cpu"):
        check_possible(["transformers"], GenerationSettings(model=str(file), device="mps"))


def test_every_mode_of_ours_writes_the_plain_text_in_its_own_way(session: Session) -> None:
    names = ["plain", "adaptive", "k1", "k3", "suffix"]
    with open_modes(names, session, (), 100, Console(quiet=True)) as modes:
        assert [mode.name for mode in modes] == names and all(mode.ours and mode.process is None for mode in modes)
        plain, *others = ((mode, mode.run(IDS, None)) for mode in modes)
        assert len(plain[1].tokens) == 30 and plain[1].stats.drafted == 0
        for mode, run in others:
            assert run.tokens == plain[1].tokens
            assert run.stats.drafted > 0
            assert mode.run(IDS, run.tokens[:7]).tokens == run.tokens[:7]
        lengths = {mode.name: set(run.stats.draft_lengths) for mode, run in others}
        assert lengths["k1"] <= {0, 1} and lengths["k3"] <= {0, 1, 2, 3}


def test_modes_do_not_teach_each_other(session: Session) -> None:
    one, other = Ours(session, "adaptive", "adaptive"), Ours(session, "suffix", "adaptive")
    one.run(IDS, None)
    assert session.model.lengths is one.lengths
    assert one.lengths._records and not other.lengths._records
    assert other.lengths.measured_for == (1, 1), "what was measured at load is the machine's"


def test_rounds_are_heard(session: Session) -> None:
    rounds: list[Round] = []
    run = Ours(session, "k2", 2).run(IDS, None, on_round=rounds.append)
    assert len(rounds) == run.stats.rounds


def test_a_head_is_needed_for_its_modes(session: Session) -> None:
    for name in ("mtp", "wrong"):
        with (
            pytest.raises(ValueError, match="need a trained head, and there is none"),
            open_modes(["plain", name], session, (), 100, Console(quiet=True)),
        ):
            pass


def test_the_head_alone_and_made_wrong(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Ours(session, "plain", 0).run(IDS, None)
    head = ScriptedDrafter([*IDS[0].tolist(), *plain.tokens], SCRIPTS["all right"], VOCAB)
    head.name = "mtp"
    monkeypatch.setattr(session.model, "drafter", CompositeDrafter(head))
    with open_modes(["plain", "mtp", "wrong"], session, (), 100, Console(quiet=True)) as modes:
        _, right, wrong = (mode.run(IDS, None) for mode in modes)
    assert right.tokens == wrong.tokens == plain.tokens
    assert list(right.stats.draft_sources) == ["mtp"] and right.stats.accepted == right.stats.drafted > 0
    assert list(wrong.stats.draft_sources) == ["wrong"] and wrong.stats.accepted == 0 < wrong.stats.drafted
    assert Wrong(head).max_draft == head.max_draft


def test_sampling_is_spelled_out(session: Session, folder: Path) -> None:
    assert sampling_of(session) == Sampling(0.0, 1.0, 50, 0)
    asked = GenerationSettings(model=str(folder), temperature=0.8, top_p=0.9, top_k=0, seed=4)
    assert sampling_of(Session(session.model, session.tokenizer, asked)) == Sampling(0.8, 0.9, 0, 4)


class FakeRemote:
    made: list[FakeRemote]

    def __init__(self, name: str, *how: Any) -> None:
        if len(self.made) == 4:
            raise ValueError(f"{name}: cannot")
        self.name, self.how, self.details, self.process, self.closed = name, how[2:], f"{name} 1.0", 7, False
        self.made.append(self)

    def run(self, ids: list[int], tokens: int) -> EngineTiming:
        return EngineTiming(tokens, 0.5, 0.25 * (tokens - 1), 8, 6)

    def cpu_seconds(self) -> float:
        return 3.0

    def close(self) -> None:
        self.closed = True


def test_engines_are_opened_by_name_and_closed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRemote, "made", [], raising=False)
    monkeypatch.setattr(module, "Remote", FakeRemote)
    names = ["plain", "transformers", "llama.cpp", "llama.cpp-ngram-mod"]
    with open_modes(names, session, (), 700, Console(quiet=True)) as modes:
        assert [engine.name for engine in FakeRemote.made] == [mode.name for mode in modes[1:]]
        assert [engine.how for engine in FakeRemote.made] == [
            ("float32", 1, Sampling(), 0),
            ("bfloat16", 1, Sampling(), 0),
            (1, 700, Sampling(), ""),
            (1, 700, Sampling(), "ngram-mod"),
        ]
        other = modes[-1]
        assert (other.ours, other.details, other.process, other.cpu_seconds()) == (
            False,
            "llama.cpp-ngram-mod 1.0",
            7,
            3.0,
        )
        run = other.run(IDS, (1, 2, 3))
        assert (run.tokens, run.seconds, run.stats.emitted, run.stats.ttft) == ((), 1.0, 3, 0.5)
        assert (run.stats.drafted, run.stats.accepted, run.stats.prompt_tokens) == (8, 6, 27)
        assert other.run(IDS, (1,)).stats.timeline == [(0.5, 1)]
        assert not any(engine.closed for engine in FakeRemote.made)
    assert all(engine.closed for engine in FakeRemote.made)
    with (
        pytest.raises(ValueError, match=r"transformers-lookup float32: cannot"),
        open_modes(["plain", "transformers-lookup"], session, (), 700, Console(quiet=True)),
    ):
        pass
