"""The memory of a GPU: what is planned for one that is not here, and what one that is here is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import run
from eval.synthetic.full_size import full_size_config
from specdec.load import MemoryBudget
from specdec.memory.plan import Planner, cache_bytes, conversations_of, free_bytes, program_bytes
from specdec.memory.video import CUDA_CONTEXT, VideoMemory, video_memory
from specdec.model.families import decoder_spec
from specdec.open import open_checkpoint
from tests.support.tiny import tiny_model
from tests.support.tiny_decoder import quantised

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GB = 10**9


def with_gpu(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card of a test")


def test_the_driver_tells_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert video_memory(CPU) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert video_memory(CUDA) is None
    assert free_bytes(CUDA) > 0, "no such device: what the machine has"
    with_gpu(monkeypatch, 9 * GB, 16 * GB)
    assert video_memory("cuda:0") == VideoMemory(9 * GB, 16 * GB)
    assert video_memory("cuda:1") is None
    assert free_bytes(CUDA) == 9 * GB
    assert program_bytes(CUDA) == CUDA_CONTEXT and program_bytes(CPU) == pytest.approx(program_bytes(), rel=0.1)


def test_the_plan_of_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["plan", "--model", "gemma-4-12b", "--context", "32768", "--device", "cuda"]
    assert run.main(words) == 2
    assert "no CUDA device is here to be asked: give the size of its memory, like --budget 16GB" in (
        capsys.readouterr().err
    )
    assert run.main([*words, "--budget", "16GB", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["program"], found["available_memory"]) == ("cuda", CUDA_CONTEXT, None)
    spec = decoder_spec(full_size_config("gemma-4-12b"))
    assert found["kv_dtype"] == "bfloat16", "as a model on a GPU has it"
    assert found["cache"] == cache_bytes(spec, 32768, torch.bfloat16)
    assert run.main([*words, "--budget", "9.5GB", "--kv-dtype", "int8"]) == 0, "12B, its drafter and 32k positions"
    assert "CUDA's context (not measured)" in capsys.readouterr().out
    assert run.main([*words, "--budget", "8GB"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit into the budget, 8.00 GB: 1.75 GB are missing" in said
    assert "not even with --kv-dtype int8 --drafter none --quantize int4-all: 8.55 GB; shorten --context" in said
    assert "longest context that fits, whatever the cache keeps: none" in said
    least = ("--kv-dtype", "int8", "--drafter", "none", "--quantize", "int4-all")
    assert run.main([*words, "--budget", "8GB", *least]) == 1
    assert "no --kv-dtype, --quantize or --drafter takes less" in " ".join(capsys.readouterr().out.split())
    assert run.main([*words, "--budget", "16GB", "--quantize", "none"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "would fit with --kv-dtype int8 --quantize int4: 9.44 GB" in said
    assert run.main([*words[:-1], "cuda:1"]) == 2
    assert "cuda:1 is not here to be asked" in capsys.readouterr().err
    assert run.main([*words[:-1], "mps", "--budget", "16GB"]) == 2
    assert "plan it with --device cpu" in capsys.readouterr().err


def test_the_plan_of_a_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with_gpu(monkeypatch, 15 * GB, 16 * GB)
    assert run.main(["plan", "--model", "gemma-4-12b", "--device", "cuda", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["available_memory"] == 15 * GB and found["budget"] == 15 * GB + CUDA_CONTEXT
    assert found["host"]["device"] == "a card of a test"
    assert run.main(["plan", "--model", "gemma-4-26b-a4b", "--device", "cuda", "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["experts"] == found["experts_in_file"] == 0, "a GPU has all experts in its memory, among the weights"


def test_a_budget_on_a_gpu_is_of_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("gemma4-moe").save_pretrained(tmp_path)
    spec, source, *_ = open_checkpoint(tmp_path)
    monkeypatch.setattr("specdec.memory.plan.LEAST", 64)
    weights = sum(source.checkpoint.loaded_bytes(name, torch.bfloat16) for name in source.names.values())
    room = MemoryBudget(CUDA_CONTEXT + 9_000_000, None).room(
        spec, source, None, torch.bfloat16, torch.bfloat16, 0, CUDA
    )
    whole = Planner(spec, weights, 0, CUDA_CONTEXT, torch.bfloat16)
    assert room == whole.room(CUDA_CONTEXT + 9_000_000, "bfloat16")
    assert room.experts is None
    with pytest.raises(ValueError, match=r"and CUDA's context 0\.50 make"):
        MemoryBudget(CUDA_CONTEXT, None).room(spec, source, None, torch.bfloat16, torch.bfloat16, 0, CUDA)


def test_conversations_take_a_share_of_the_memory_that_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = quantised("llama", "int8")
    monkeypatch.setattr("specdec.memory.plan.free_bytes", lambda device: 800)
    assert conversations_of(decoder).limit == 100
    monkeypatch.setattr("specdec.kernels.invariant", lambda device: False)
    assert conversations_of(decoder).limit == 0, "a row's bits would depend on the pass that it came with"
