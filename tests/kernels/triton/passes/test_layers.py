"""Passes of a GPU: a row has the same bits in every pass, captured or not, and they are close to the reference's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from specdec.kernels.triton.passes.graphs import Graphs
from specdec.kernels.triton.passes.layers import DeviceLayers
from tests.support.tiny import WINDOW, prompt
from tests.support.triton.here import DEVICE
from tests.support.triton.layers import device_decoder, graphs_here, run

# A sliding and a full layer; of Llama, where there is one kind, one.
FAMILIES = {"llama": (0,), "gemma3": (1, 2), "gemma4": (1, 2)}
LENGTH = WINDOW + 6
SPLITS = ([5, 5, 5, 5, 2], [19, 1, 1, 1])
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_bits_in_every_pass(family: str) -> None:
    graphs, ids = graphs_here(), prompt(LENGTH, seed=4)[0]
    decoder = device_decoder(family, "int4", FAMILIES[family], graphs)
    whole = run(decoder, ids, [LENGTH])
    for chunks in SPLITS:
        assert torch.equal(run(decoder, ids, chunks), whole), f"{chunks} rows in a pass"
    # five rows: eager, then captured; the whole text and nineteen rows are too many; one row: eager, then captured
    assert graphs.counts == {"pass eager": 5, "pass captured": 2, "pass replayed": 5}
    expected = run(device_decoder(family, "int4", FAMILIES[family]), ids, [LENGTH])
    # an exponential that rounds otherwise can move an activation to the next of its 255 steps
    assert (whole - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8])
def test_stores_of_every_type(kept: torch.dtype) -> None:
    ids = prompt(LENGTH, seed=5)[0]
    decoder = device_decoder("gemma4", "int8", (1, 2), graphs_here(), kept)
    whole = run(decoder, ids, [LENGTH])
    assert torch.equal(run(decoder, ids, [LENGTH - 6, 3, 3]), whole)
    expected = run(device_decoder("gemma4", "int8", (1, 2), kept=kept), ids, [LENGTH])
    assert (whole - expected).norm() < 0.05 * expected.norm()
    other = run(device_decoder("gemma4", "int8", (1, 2)), ids, [LENGTH])
    assert (whole - other).norm() > 0, "another type rounds otherwise"


def test_texts_in_one_pass_have_the_bits_of_each_alone() -> None:
    graphs = graphs_here()
    decoder = device_decoder("gemma3", "mixed", (1, 2), graphs)
    texts = [prompt(9, seed=1)[0], prompt(12, seed=2)[0]]
    alone = [run(decoder, text, [len(text)]) for text in texts]
    caches = [decoder.new_cache() for _ in texts]
    ends = ((3, 8), (6, 10), (9, 12))
    before = (0, 0)
    for after in ends:
        rows = [text[b:a].to(DEVICE) for text, b, a in zip(texts, before, after, strict=True)]
        states = decoder.forward_many(rows, caches).last.cpu()
        for i, part in enumerate(states.split([len(one) for one in rows])):
            assert torch.equal(part, alone[i][before[i] : after[i]]), f"text {i} at {before[i]}"
            caches[i].commit(len(rows[i]))
        before = after
    assert graphs.counts["pass captured"] == 1, "two passes had 3 and 2 rows"


def test_a_long_pass_goes_through_each_layer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids = device_decoder("gemma4", "int8", (1, 2), graphs_here()), prompt(LENGTH, seed=6)[0]
    whole = run(decoder, ids, [LENGTH])
    monkeypatch.setattr("specdec.model.stack.MAX_ROWS", 10)
    assert torch.equal(run(decoder, ids, [LENGTH]), whole)


def test_a_store_that_grows_is_read_where_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cache.stores.GROWTH", 20)
    graphs = graphs_here()
    decoder, ids = device_decoder("llama", "int8", (0,), graphs), prompt(24, seed=7)[0]
    cache = decoder.new_cache()
    parts = []
    for part in ids.to(DEVICE).split([16, 2, 2, 2, 2]):  # it moves at 20
        parts.append(decoder.forward(part, cache).last.cpu())
        cache.commit(len(part))
    assert graphs.counts["pass captured"] == 2, "one graph before, and one after"
    assert torch.equal(torch.cat(parts), run(decoder, ids, [20, 4]))


def test_outputs_of_other_layers_and_dense_weights() -> None:
    decoder, ids = device_decoder("llama", "int8", (0, 1), Graphs(None)), prompt(4, seed=8)[0].to(DEVICE)
    cache = decoder.new_cache()
    states = decoder.forward(ids, cache, (0, 1))
    first = device_decoder("llama", "int8", (0,), Graphs(None))
    alone = first.forward(ids, first.new_cache(), (0,))
    assert torch.equal(states.aux[0], alone.aux[0])
    assert not torch.equal(states.aux[0], states.aux[1])


def test_stores_that_the_kernels_cannot_keep_are_gone_through_op_by_op() -> None:
    graphs, ids = graphs_here(), prompt(9, seed=9)[0]
    decoder = device_decoder("gemma4", "int8", (1, 2), graphs)
    passes = decoder.stack.fused
    assert isinstance(passes, DeviceLayers)
    widths = {view.value_width for view in decoder.new_cache().views if view is not None}
    passes._keeps = lambda view, rows: view.value_width != max(widths)
    found = run(decoder, ids, [4, 5])
    assert graphs.counts == {}, "nothing was a pass of the GPU's"
    expected = run(device_decoder("gemma4", "int8", (1, 2)), ids, [9])
    assert (found - expected).norm() < 0.05 * expected.norm()
