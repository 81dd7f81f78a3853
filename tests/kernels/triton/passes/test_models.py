"""What only some models have, from end to end: a mixture of experts, an adapter, and a picture in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import specdec
from specdec import kernels
from specdec.model.decoder import Decoder
from specdec.model.media import MediaBlock
from tests.support.adapters.tiny_adapter import make_peft
from tests.support.tiny import prompt, tiny_model
from tests.support.triton.here import DEVICE
from tests.support.triton.layers import device_decoder, graphs_here, run

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("chosen")
def test_a_row_of_a_mixture_has_the_same_bits_in_every_pass() -> None:
    graphs, ids = graphs_here(), prompt(9, seed=10)[0]
    decoder = device_decoder("gemma4-moe", "int4", (1,), graphs)
    (experts,) = (layer.experts for layer in decoder.layers)
    assert experts is not None and experts.gate_up.packed is not None
    whole = run(decoder, ids, [9])
    assert torch.equal(run(decoder, ids, [4, 4, 1]), whole)
    assert graphs.counts == {"pass eager": 4}, "which experts its rows use is asked for in the middle of a pass"
    kernels.choose("native")
    expected = run(device_decoder("gemma4-moe", "int4", (1,)), ids, [9])
    assert (whole - expected).norm() < 0.05 * expected.norm()


@pytest.mark.usefixtures("chosen")
@pytest.mark.filterwarnings("ignore:Triton's interpreter computes")
def test_a_row_of_a_text_with_an_adapter_has_the_same_bits_in_every_pass(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    adapter = {"one": str(make_peft(tmp_path / "one", "llama", 1))}
    options: dict[str, Any] = {"drafter": None, "quantize": "int8", "adapter": adapter}

    def states(device: torch.device, chunks: list[int], name: str = "one") -> Tensor:
        decoder = specdec.load(tmp_path / "tiny", device=device, **options).decoder
        cache, found = decoder.new_cache(adapter=name), []
        with torch.inference_mode():
            for part in ids.to(device).split(chunks):
                found.append(decoder.forward(part, cache).last.cpu())
                cache.commit(len(part))
        return torch.cat(found)

    ids = prompt(5, seed=13)[0]
    before = kernels.graph_counts(DEVICE)
    whole = states(DEVICE, [5])
    assert (kernels.graph_counts(DEVICE) - before)["pass op-by-op"] == 1
    assert torch.equal(states(DEVICE, [3, 1, 1]), whole)
    assert not torch.equal(states(DEVICE, [5], "none"), whole)
    kernels.choose("native")
    expected = states(torch.device("cpu"), [5])
    assert (whole - expected).norm() < 0.05 * expected.norm()


def test_rows_of_a_picture_see_each_other_and_a_row_after_it_has_the_same_bits_in_every_pass() -> None:
    ids, draw = prompt(12, seed=11)[0], torch.Generator().manual_seed(12)
    decoder, plain = (device_decoder("gemma4", "int8", (1, 2), graphs) for graphs in (graphs_here(), None))
    made = torch.randn(6, decoder.spec.hidden_size, generator=draw, dtype=torch.float32)

    def states(by: Decoder, chunks: list[int], whole: bool = True) -> Tensor:
        """Return the last states of the text, on the CPU: [n, hidden]."""
        block, cache, found = MediaBlock(3, 9, b"", whole, lambda: made.to(by.device)), by.new_cache(), []
        for part in ids.to(by.device).split(chunks):
            found.append(by.forward(part, cache, (), (block,)).last.cpu())
            cache.commit(len(part))
        return torch.cat(found)

    rest = [3, 6, 1, 1, 1]
    found = states(decoder, [12])
    assert torch.equal(states(decoder, rest), found) and torch.equal(states(decoder, [9, 3]), found)
    expected = states(plain, [12])
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(states(decoder, rest, whole=False)[3:9], found[3:9]), "its rows saw later ones"
