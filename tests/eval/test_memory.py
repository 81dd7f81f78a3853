"""The memory command: measures in a process of its own, with a conversation in place, beside the plan."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from eval.kernels.model_pass import LARGEST, filled_cache, random_tokens
from eval.memory import Case, Measured, fill_conversation, main, measure
from eval.plan import Asked, plan_memory
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config
from specdec.memory.plan import cache_bytes
from tests.support.tiny_decoder import of
from tests.support.tiny_folder import make_folder


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
def test_a_filled_cache_is_as_large_as_a_computed_one(kept: torch.dtype) -> None:
    decoder = of("gemma4", kept)
    conversation = fill_conversation(decoder, random_tokens(decoder, 300))
    assert conversation.cache.nbytes == cache_bytes(decoder.spec, 300, kept)
    assert len(conversation.tokens) == conversation.cache.length == 300
    assert all(part.float().abs().amax(dim=-1).min() > 0 for store in conversation.cache.stores for part in store.parts)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
def test_random_numbers_of_a_cache_are_equally_small_in_every_type(kept: torch.dtype) -> None:
    for store in filled_cache(of("gemma4", kept), 300).stores:
        for numbers, scale in ((store.keys, store.key_scale), (store.values, store.value_scale)):
            if numbers is not None:
                whole = numbers.float() if scale is None else numbers.float() * scale[..., None]
                assert 0.9 * LARGEST < whole.abs().amax() < 1.01 * LARGEST, "larger ones make other costs"


def test_every_context_and_cache_is_a_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "model")

    def as_planned(case: Case) -> Measured:
        asked = Asked(case.model, case.drafter, case.quantize, torch.float32, case.context, None, case.kv_dtype)
        plan = plan_memory(asked, 10**8).needs(case.context, case.kv_dtype)
        return Measured(case.context, case.kv_dtype, plan, plan.total, 1.0, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr("eval.memory.measure", as_planned)
    monkeypatch.setattr("eval.memory.ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    arguments = ["--model", str(folder), "--drafter", "suffix", "--prefill", "70", "--tokens", "4"]
    arguments += ["--context", "128", "600", "--kv-dtype", "int8", "float32", "--json", str(tmp_path / "record")]
    assert main(arguments) == 0
    measured = json.loads((tmp_path / "record").read_text())["measured"]
    cases = [("int8", 128), ("int8", 600), ("float32", 128), ("float32", 600)]
    assert [(m["kv_dtype"], m["context"]) for m in measured] == cases
    assert main(["--model", str(tmp_path / "nothing"), "--context", "400"]) == 2
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--context", "70"])


def test_a_case_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    arguments = ["--model", str(folder), "--drafter", "suffix", "--threads", "1", "--prefill", "70", "--tokens", "4"]
    code = main([*arguments, "--context", "600", "--kv-dtype", "int8", "--json", str(tmp_path / "record")])
    (measured,) = json.loads((tmp_path / "record").read_text())["measured"]
    assert measured["context"] == 600
    assert measured["peak"] > 1e8
    assert measured["ratio"] == measured["peak"] / measured["plan"]["total"]
    assert min(measured["per_token"], measured["prefill_per_second"], measured["drafted"]) > 0
    assert code == int(abs(measured["ratio"] - 1) > 0.05)


def test_a_picture_and_a_video_are_computed_and_planned(tmp_path: Path) -> None:
    write_model(full_size_config("gemma-4-tiny"), None, tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--drafter", "suffix", "--threads", "1", "--prefill", "9"]
    arguments += ["--tokens", "4", "--picture", "70", "--frames", "2", "--kv-dtype", "int8"]
    main([*arguments, "--context", "400", "--json", str(tmp_path / "record")])
    record = json.loads((tmp_path / "record").read_text())
    (measured,) = record["measured"]
    assert (record["picture"], record["frames"]) == (70, 2)
    assert measured["plan"]["media"] > (70 + 2 * 70) * 6912 * 4
    assert measured["prefill_per_second"] > 0
    assert main([*arguments, "--context", "100"]) == 2


def test_the_last_frames_alone_are_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(full_size_config("gemma-4-tiny"), None, tmp_path / "model")
    case = Case(str(tmp_path / "model"), "suffix", None, 600, "int8", 9, 4, 2, 1, frames=6, computed_frames=2)
    assert measure(case).prefill_per_second > 0  # it asserts that the others came from the cache
    words = ["--model", str(tmp_path / "model"), "--context", "600", "--frames", "2", "--computed-frames", "3"]
    with pytest.raises(SystemExit):
        main(words)
    assert "a part of --frames" in capsys.readouterr().err
