"""The engines of `bench --against`: ours on a tiny model, child processes with fakes, then the real other ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import specdec
from eval import against as module
from eval.against import check_possible, open_engines, sampling_of
from eval.cli import Settings
from eval.engines import DRAFTED, PLAIN, LlamaCpp, Ours, Sampling, Timing, Transformers, check_packages
from eval.remote import Remote
from eval.session import Session, open_session
from tests.fake_engine import Dying, FakeEngine, Refusing, Stubborn, broken, working


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return open_session(Settings(model=str(folder), device="cpu", threads=1, max_new_tokens=6, draft_length=3))


def test_ours_goes_on_past_eos_and_drafting_is_on_where_it_says_so(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = session.run(torch.tensor([[5, 6, 7] * 9]), max_new_tokens=30, eos_token_id=None).tokens[3]
    monkeypatch.setattr(session.model.generation_config, "eos_token_id", eos)
    assert len(session.run(torch.tensor([[5, 6, 7] * 9]), max_new_tokens=30).tokens) <= 4
    for engine in (Ours(session, drafted=False), Ours(session, drafted=True)):
        timing = engine.run([5, 6, 7] * 9, 30)
        assert timing.tokens == session.model.last_stats.emitted == 30
        assert timing.first > 0 and timing.rest > 0
        assert (session.model.last_stats.drafted > 0) == (engine.name == DRAFTED)
    assert engine.run([5, 6, 7] * 9, 1).rest == 0


def test_sampling_is_spelled_out(session: Session, folder: Path) -> None:
    assert sampling_of(session) == Sampling(0.0, 1.0, 50, 0)
    asked = Settings(model=str(folder), temperature=0.8, top_p=0.9, top_k=0, seed=4)
    assert sampling_of(Session(session.model, session.tokenizer, asked)) == Sampling(0.8, 0.9, 0, 4)


def test_engines_are_opened_by_name_and_closed(session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FakeEngine] = []

    def remote(name: str, *how: Any) -> FakeEngine:
        if len(opened) == 3:
            raise ValueError(f"{name}: cannot")
        opened.append(FakeEngine(f"{name} {how[2:]}"))
        return opened[-1]

    monkeypatch.setattr(module, "Remote", remote)
    with open_engines(session, ["transformers", "llama.cpp"], 700, Console(quiet=True)) as engines:
        assert [engine.name for engine in engines[:2]] == [PLAIN, DRAFTED]
        assert [engine.name for engine in engines[2:]] == [
            f"transformers float32 ('float32', 1, {Sampling()})",
            f"transformers bfloat16 ('bfloat16', 1, {Sampling()})",
            f"llama.cpp (1, 700, {Sampling()})",
        ]
        assert not any(engine.closed for engine in opened)
    assert all(engine.closed for engine in opened)
    opened = opened[2:]
    with (
        pytest.raises(ValueError, match=r"llama\.cpp: cannot"),
        open_engines(session, ["transformers", "llama.cpp"], 700, Console(quiet=True)),
    ):
        pass
    assert all(engine.closed for engine in opened)


def test_what_cannot_be_compared_is_said_before_anything_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(model=str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"is none: name such a file"):
        check_possible([], settings)
    with pytest.raises(ValueError, match="--max-new-tokens 2 or more"):
        check_possible([], Settings(model=str(folder), max_new_tokens=1))
    monkeypatch.setattr("eval.engines.util.find_spec", lambda name: None if name == "xllamacpp" else name)
    check_packages(["transformers"])
    with pytest.raises(ValueError, match=r"xllamacpp: pip install -c constraints.txt -e '.\[bench\]'"):
        check_possible(["transformers", "llama.cpp"], settings)


def test_a_child_answers_until_it_is_closed_and_ends_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    engine = Remote("far", working, 0.25)
    try:
        assert engine.details == "details of working"
        assert engine.run([1, 2], 5) == Timing(5, 0.5, 1.0)
        before = engine.cpu_seconds()
        assert 0 < before <= engine.cpu_seconds()
        assert engine.process == engine._child.pid
    finally:
        engine.close()
    assert engine._child.exitcode == 0
    assert capfd.readouterr().err == ""


def test_what_goes_wrong_in_a_child_is_a_value_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"^far: RuntimeError: no such architecture$"):
        Remote("far", broken)
    for make, complaint in ((Refusing, "^far: too long$"), (Dying, r"^far: its process has ended \(exit code 7\)")):
        engine = Remote("far", make)
        with pytest.raises(ValueError, match=complaint):
            engine.run([1], 2)
        with pytest.raises(ValueError, match=r"^far: its process has ended"):
            engine.run([1], 2)
        engine.close()


def test_a_child_at_work_is_ended_by_closing() -> None:
    engine = Remote("far", Stubborn)
    engine._pipe.send(([1], 2))
    time.sleep(0.2)
    engine.close()
    assert not engine._child.is_alive()


def real(name: str, make: Any, *how: Any) -> Any:
    return Remote(name, make, specdec.model_path("smollm2-135m-instruct"), *how)


@pytest.mark.model
def test_transformers_decodes_what_it_is_asked_for() -> None:
    engine = real("transformers bfloat16", Transformers, "bfloat16", torch.get_num_threads(), Sampling())
    try:
        assert "attention" in engine.details
        timing = engine.run(range(5, 30), 4)
        assert timing.tokens == 4
        assert timing.first > 0 and timing.rest > 0
        assert engine.run(range(5, 30), 1).rest == 0
    finally:
        engine.close()


@pytest.mark.model
def test_llama_cpp_decodes_what_it_is_asked_for() -> None:
    pytest.importorskip("xllamacpp")
    for sampling in (Sampling(), Sampling(0.8, 0.95, 40, 3)):
        engine = real("llama.cpp", LlamaCpp, torch.get_num_threads(), 256, sampling)
        try:
            assert "built for" in engine.details and "AVX = 1" not in engine.details
            timing = engine.run(range(5, 30), 6)
            assert timing.tokens == 6
            assert timing.first > 0 and timing.rest > 0
            assert engine.run(range(5, 30), 1).rest < timing.rest
            with pytest.raises(ValueError, match=r"llama\.cpp: refused the request"):
                engine.run(range(5, 2000), 6)
        finally:
            engine.close()
