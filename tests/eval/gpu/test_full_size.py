"""The stages that time a model on a GPU, here on the CPU with a tiny one: what they find, and that they go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from eval.gpu import full_size
from eval.gpu.full_size import FullSize, product_figures

CPU, GB = torch.device("cpu"), 10**9


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GB, 16 * GB))
    for name, value in {"PROMPT": 200, "LONG": 3000, "TOKENS": 24, "CONTEXT": 100, "PRODUCT": (64, 96)}.items():
        monkeypatch.setattr(full_size, name, value)


@pytest.fixture(scope="module")
def tiny() -> FullSize:
    return FullSize(CPU, "gemma-4-tiny")


def test_passes_and_a_drafts_token(tiny: FullSize) -> None:
    found = tiny.passes(1e9)
    assert list(found["pass_ms"]) == ["1", "2", "3", "4", "5", "8", "9", "16"]
    assert found["v8"] == pytest.approx(found["pass_ms"]["8"] / found["pass_ms"]["1"]) and found["v8"] > 0
    assert found["token_share"] == pytest.approx(found["bytes_per_pass"] / 1e9 / (found["pass_ms"]["1"] / 1e3))
    assert found["draft_cost"] == pytest.approx(
        (found["draft_ms"]["4"] - found["draft_ms"]["1"]) / 3 / found["pass_ms"]["1"]
    )


def test_a_prompt_and_synthetic_acceptance(tiny: FullSize) -> None:
    assert tiny.prefill()["prefill_tokens_per_second"] > 0
    found = tiny.decoding()
    assert found["drafted_text_is_plain_text"] is True and 1.5 < found["mean_acceptance_length"] <= 4
    gain = found["drafted_tokens_per_second"] / found["plain_tokens_per_second"]
    assert found["drafted_gain"] == pytest.approx(gain)


def test_memory_counts_what_was_taken_since_the_beginning(tiny: FullSize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "bytes_in_use", lambda: 12 * GB)
    assert tiny.memory(2 * GB)["memory_gb"] == 10.0
    assert tiny.memory(None)["memory_gb"] == 11.0, "all that is in use, where the driver does not say"
    monkeypatch.setattr(full_size, "bytes_in_use", lambda: None)
    assert tiny.memory(2 * GB)["memory_gb"] == 11.0
    assert tiny.memory(0)["cache_gb"] > 0


def test_products_of_several_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(launches: Sequence[Callable[[], torch.Tensor]]) -> float:
        assert len(launches) > 1 and all(launch().shape[1] == 64 for launch in launches[:2])
        return 1e-6

    monkeypatch.setattr(full_size, "launch_seconds", seconds)
    monkeypatch.setattr(full_size, "COPIES", 20_000)
    found = product_figures(1e9, CPU)
    assert {"1", "64", "minimum 1"} < set(found["products"])
    assert found["product_share"] == found["products"]["1"]["share_of_bandwidth"] > 0
