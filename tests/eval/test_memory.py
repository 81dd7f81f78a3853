"""The memory command: measures in a process of its own, with a conversation in place, beside the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.memory import fill_conversation, main
from specdec.memory.plan import cache_bytes
from tests.support.tiny_decoder import of
from tests.support.tiny_folder import make_folder


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
def test_a_filled_cache_is_as_large_as_a_computed_one(kept: torch.dtype) -> None:
    decoder = of("gemma4", kept)
    conversation = fill_conversation(decoder, 300)
    assert conversation.cache.nbytes == cache_bytes(decoder.spec, 300, kept)
    assert len(conversation.tokens) == conversation.cache.length == 300
    assert all(part.float().abs().amax(dim=-1).min() > 0 for store in conversation.cache.stores for part in store.parts)


def test_the_command_measures_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "model")
    arguments = ["--model", str(folder), "--drafter", "suffix", "--threads", "1", "--prefill", "70", "--tokens", "4"]
    code = main([*arguments, "--context", "128", "600", "--kv-dtype", "int8", "--json", str(tmp_path / "record")])
    record = json.loads((tmp_path / "record").read_text())
    assert [m["context"] for m in record["measured"]] == [128, 600]
    for measured in record["measured"]:
        assert measured["peak"] > 1e8
        assert measured["ratio"] == measured["peak"] / measured["plan"]["total"]
        assert min(measured["per_token"], measured["prefill_per_second"], measured["drafted"]) > 0
    assert code == int(any(abs(m["ratio"] - 1) > 0.05 for m in record["measured"]))
    assert main(["--model", str(tmp_path / "nothing"), "--context", "400"]) == 2
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--context", "70"])
