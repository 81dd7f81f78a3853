"""Perplexity is what a direct computation says, on windows that score every token once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.perplexity import Comparison, Score, compare, main, windows
from eval.prompts.english import manual_prose, prose
from specdec import load_tokenizer
from tests.support.tiny import tiny_model

TEXT = "The ferry leaves at seven, and whoever is late takes the road around the lake. " * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def measure(folder: Path, text: Path, *arguments: str) -> int:
    fixed = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--text", str(text)]
    return main([*fixed, "--tokens", "100", "--context", "32", "--json", "-", *arguments])


def recorded(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    return json.loads(capsys.readouterr().out)


def test_perplexity_is_that_of_a_direct_computation(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert measure(folder, text, "--json", str(tmp_path / "out.json")) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    ids = torch.tensor(load_tokenizer(folder)(TEXT)["input_ids"])
    losses = []
    with torch.inference_mode():
        for start, stop in ((0, 32), (32, 64), (64, 96), (96, 104)):  # 31 + 31 + 31 + 7 scored
            logits = tiny_model("gemma3")(ids[None, start:stop]).logits[0].double()
            chances = logits[:-1].log_softmax(dim=-1)
            losses += (-chances.gather(1, ids[start + 1 : stop, None])).flatten().tolist()
    assert len(losses) == 100
    expected = math.exp(sum(losses) / 100)
    assert record["tokens"] == 100 and record["windows"] == 4
    assert record["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert record["reference_perplexity"] == pytest.approx(expected, rel=1e-6)
    assert record["top_1_agreement"] > 0.95


def test_our_own_reference_agrees_with_transformers(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(folder, text) == 0
    theirs = recorded(capsys)["reference_perplexity"]
    assert measure(folder, text, "--reference", "specdec") == 0
    assert recorded(capsys)["reference_perplexity"] == pytest.approx(theirs, rel=1e-4)


def test_a_rounded_cache_is_measured_too(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for kept in ("float32", "int8"):
        assert measure(folder, text, "--kv-dtype", kept) == 0
        record = recorded(capsys)
        assert record["arguments"]["kv_dtype"] == kept
        found[kept] = record["perplexity"]
    assert found["int8"] != found["float32"]
    assert found["int8"] == pytest.approx(found["float32"], rel=0.02)


def test_a_difference_that_is_not_allowed_fails(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(folder, text, "--quantize", "int4", "--within", "0.0001") == 1
    record = recorded(capsys)
    assert abs(record["difference_percent"]) > 0.0001
    allowed = str(abs(record["difference_percent"]) + 0.01)
    assert measure(folder, text, "--quantize", "int4", "--within", allowed) == 0


def test_ctrl_c_keeps_what_was_scored(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = Score.of, []

    def impatient(logits: Tensor, window: Tensor) -> Score:
        calls.append(1)
        if len(calls) == 4:  # the second window's reference
            raise KeyboardInterrupt
        return honest(logits, window)

    monkeypatch.setattr(Score, "of", impatient)
    assert measure(folder, text) == 130
    record = recorded(capsys)
    assert (record["interrupted"], record["windows"], record["tokens"]) == (True, 1, 31)
    assert record["perplexity"] == pytest.approx(record["reference_perplexity"], rel=1e-3)


def test_ctrl_c_before_anything_was_scored(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(logits: Tensor, window: Tensor) -> Score:
        raise KeyboardInterrupt

    monkeypatch.setattr(Score, "of", impatient)
    assert measure(folder, text) == 130
    record = recorded(capsys)
    assert (record["tokens"], record["perplexity"], record["top_1_agreement"]) == (0, None, None)


def test_user_errors_are_one_line(folder: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert measure(folder, text, "--tokens", "9000") == 2
    assert "ask for fewer --tokens" in capsys.readouterr().err.strip().splitlines()[-1]
    assert measure(folder, text, "--context", "9000") == 2
    assert "--context 9000 exceeds the model's 8192" in capsys.readouterr().err.strip().splitlines()[-1]
    assert measure(folder, tmp_path / "gone.txt") == 2
    assert "cannot be read as UTF-8 text" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 20])
def test_windows_score_every_token_but_the_first_of_each(tokens: int) -> None:
    pieces = windows(range(100), 8, tokens, None)
    assert sum(len(piece) - 1 for piece in pieces) == tokens
    assert all(2 <= len(piece) <= 8 for piece in pieces)
    assert torch.cat(pieces).tolist() == list(range(tokens + len(pieces)))  # nothing twice, nothing left out


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 20])
def test_bos_begins_every_window_and_every_own_token_is_scored(tokens: int) -> None:
    pieces = windows(range(100), 8, tokens, first=777)
    assert all(piece[0] == 777 and 2 <= len(piece) <= 8 for piece in pieces)
    assert torch.cat([piece[1:] for piece in pieces]).tolist() == list(range(tokens))


def test_a_short_text_says_how_much_it_has() -> None:
    ids = list(range(20))
    assert len(windows(ids, 8, 17, None)) == 3  # 8 + 8 + 4 tokens: 7 + 7 + 3 scored
    with pytest.raises(ValueError, match="has 17 tokens to score"):
        windows(ids, 8, 18, None)
    with pytest.raises(ValueError, match="has 20 tokens to score"):
        windows(ids, 8, 21, first=777)


def test_figures_of_a_comparison() -> None:
    vocabulary = 10
    window = torch.tensor([3, 1, 2])
    even = torch.zeros(3, vocabulary)
    sure = torch.zeros(3, vocabulary)
    sure[0, 1] = sure[1, 5] = 2.0  # right about the first, wrong about the second
    comparison = Comparison([(Score.of(even, window), Score.of(sure, window))])
    assert comparison.tokens == 2
    assert comparison.perplexity == pytest.approx(vocabulary)
    both = math.log(math.exp(2.0) + vocabulary - 1)
    assert comparison.reference_perplexity == pytest.approx(math.exp((2 * both - 2.0) / 2))
    assert comparison.difference == pytest.approx(100 * (vocabulary / math.exp(both - 1.0) - 1))
    assert Comparison([(Score.of(sure, window), Score.of(sure, window))]).agreement == 1.0
    half = sure.clone()
    half[1, 6] = 3.0
    assert Comparison([(Score.of(half, window), Score.of(sure, window))]).agreement == 0.5


def test_the_last_positions_logits_predict_nothing() -> None:
    window, logits = torch.tensor([1, 2]), torch.zeros(2, 4)
    before = Score.of(logits, window).loss
    logits[1] = torch.tensor([5.0, -5.0, 5.0, 1.0])
    assert Score.of(logits, window).loss == before


def test_logits_that_are_not_finite_are_refused() -> None:
    comparison, windows_ = Comparison(), [torch.tensor([1, 2])]
    broken = torch.full((2, 4), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        compare(comparison, windows_, lambda _: broken, lambda _: torch.zeros(2, 4), lambda: None)
    assert comparison.tokens == 0


def test_prose_is_sentences() -> None:
    sentence = "An *exception* is raised where the error is found; it may be handled by whoever __called__ the code"
    page = (
        f"Exceptions\n**********\n\n{sentence.replace('; ', ';' + chr(10))}.\n\n    {sentence}.\n\n{sentence}.\n\n"
        f"Too short.\n\nobject.add(self, other) {sentence}(self)\n\nstmt ::= {sentence}."
    )
    assert prose([page, page]) == [sentence.replace("*exception*", "exception") + "."]


def test_the_manual_has_enough_prose() -> None:
    text = manual_prose()
    assert len(text) > 100_000
    assert "::=" not in text and ">>>" not in text and "****" not in text
