"""Other engines: child processes with fakes, then the real ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

import specdec
from eval.bench.engines import EngineTiming, LlamaCpp, Sampling, Transformers, check_packages
from eval.bench.remote import Remote
from eval.cli.names import NGRAM
from tests.support.processes.fake_engine import Dying, Refusing, Stubborn, broken, working
from tests.support.tiny import tiny_model
from tests.support.tiny_gguf import write_model


def test_missing_packages_are_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.bench.engines.util.find_spec", lambda name: None if name == "xllamacpp" else name)
    check_packages(["transformers"])
    with pytest.raises(ValueError, match=r"xllamacpp: pip install -c constraints.txt -e '.\[bench\]'"):
        check_packages(["transformers", "llama.cpp"])


def test_a_child_answers_until_it_is_closed_and_ends_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    engine = Remote("far", working, 0.25)
    try:
        assert engine.details == "details of working"
        assert engine.run([1, 2], 5) == EngineTiming(5, 0.5, 1.0)
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


@pytest.mark.parametrize("lookup", [0, 10])
def test_transformers_decodes_what_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, lookup: int) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_model("llama"))
    engine = Transformers(Path("model.gguf"), "float32", 1, Sampling(), lookup)
    assert "attention" in engine.details and ("prompt lookup of 10 tokens" in engine.details) == bool(lookup)
    timing = engine.run(range(5, 30), 4)
    assert timing.tokens == 4
    assert timing.first > 0 and timing.rest > 0
    assert engine.run(range(5, 30), 1).rest == 0
    assert engine.run([*range(5, 30)] * 2, 12).tokens == 12


def test_transformers_reads_the_file_that_we_read(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf", "llama", GGMLQuantizationType.Q8_0)
    engine = Remote("lookup", Transformers, file, "bfloat16", 1, Sampling(), 10)
    try:
        assert "prompt lookup of 10 tokens" in engine.details
        assert engine.run([*range(5, 30)] * 2, 12).tokens == 12
    finally:
        engine.close()


@pytest.mark.model
def test_every_kind_of_llama_cpps_speculation_runs_and_is_named() -> None:
    pytest.importorskip("xllamacpp")
    for kind in NGRAM:
        engine = real(kind, LlamaCpp, torch.get_num_threads(), 256, Sampling(), kind)
        try:
            assert engine.details.endswith(f", {kind}")
            timing = engine.run([*range(5, 30)] * 3, 12)
            assert timing.tokens == 12 and 0 <= timing.accepted <= timing.drafted
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
