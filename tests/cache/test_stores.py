"""What stores keep: floats, int8 with a scale, V alone where K can be made from it; and never another text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdec import kernels
from specdec.cache import KVCache, StoreShape
from specdec.cache.stores import BLOCK, GROWTH, LayerStore, slots_for
from specdec.drafting.protocol import Drafter, FixedLength, NoDraft
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.model.decoder import Decoder
from tests.support.decoding import decode, never
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import FAMILIES, VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_decoder import of

CPU = torch.device("cpu")
KEPT = [torch.float32, torch.bfloat16, torch.int8]


def decoded(decoder: Decoder, drafter: Drafter, temperature: float = 0.0, count: int = 5 * WINDOW) -> list[int]:
    ids, stats = prompt(20, seed=4)[0], GenerationStats()
    drafter.bind(decoder)
    sampler = Sampler((lambda ids, logits: logits / temperature) if temperature else None, 7 if temperature else None)
    request = Request(ids, len(ids) + count, sampler, never)
    ((_, row, _),) = decode(decoder, drafter, FixedLength(5), [request], stats)
    return row.tolist()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("window", [None, 8])
def test_a_store_gives_back_what_it_was_given(window: int | None, kept: torch.dtype) -> None:
    cache = KVCache([StoreShape(2, 16, window)], kept, CPU, max_rows=5)
    store = cache.stores[0]
    assert store is not None
    generator, written = torch.Generator().manual_seed(1), []
    for step in range(300):
        rows = torch.randn(2, 1 + step % 5, 2, 16, generator=generator) * 10.0 ** (step % 7 - 3)
        start = cache.begin(rows.shape[1])
        store.write(start, *rows)
        cache.commit(rows.shape[1])
        written.append(rows)
    everything = torch.cat(written, dim=1).transpose(1, 2)  # [2, heads, n, width]
    low = 0 if window is None else cache.length - window
    largest = everything[:, :, low:].abs().amax(dim=-1, keepdim=True)
    bound = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.int8: 0.5 / 127 * 1.00001}[kept]
    for found, given in zip(kernels.read_kv(store.view, low, cache.length), everything[:, :, low:], strict=True):
        assert ((found - given).abs() <= bound * largest.amax(0)).all()
    assert cache.nbytes == store.slots * 2 * 2 * (16 * kept.itemsize + 4 * (kept is torch.int8))


def test_making_a_store_starts_no_threads_of_torchs() -> None:
    """Thirty layers' stores would wait for each other's threads sixty times."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("this system does not list a process's threads")
    before = torch.get_num_threads()
    torch.set_num_threads(13)
    try:
        running = len(list(tasks.iterdir()))
        store = LayerStore(StoreShape(3, 64, None), 64, torch.float32, CPU)
        store.reserve(GROWTH + 1)
        assert len(list(tasks.iterdir())) == running and not store.values.any()
        torch.zeros(store.values.shape)
        assert len(list(tasks.iterdir())) > running  # so it would have shown
    finally:
        torch.set_num_threads(before)


def test_numbers_that_int8_cannot_scale() -> None:
    x = torch.zeros(1, 4, 8)
    x[0, 1, 3], x[0, 2, 5], x[0, 3] = torch.nan, torch.inf, 1e-35
    values, scale = kernels.quantise_store(x)
    assert not values.any() and scale[0, 0] == scale[0, 3] == 0 and scale[0, 1:3].isnan().all()


@pytest.mark.parametrize("kept", KEPT)
def test_keys_are_made_from_values(kept: torch.dtype) -> None:
    both = of("gemma4", kept)
    cache = both.new_cache()
    ids = prompt(GROWTH + 40, seed=3)[0]
    for part in ids.split(cache.max_rows):
        both.forward(part, cache)
        cache.commit(len(part))
    full = both.spec.shared_kv_layers["full_attention"]
    store = cache.stores[full]
    assert store is not None and store.keys is None and store.slots == 2 * GROWTH
    layer = both.layers[full]
    keys, values = kernels.read_kv(store.view, 0, cache.length)
    turned = both.rotations("full_attention", [(0, len(ids))])
    exact = kernels.rope((values * layer.k_norm).transpose(0, 1).contiguous(), *turned)
    assert torch.equal(keys, exact.transpose(0, 1))
    shape = StoreShape(layer.spec.kv_heads, layer.spec.head_dim, None)
    assert 2 * store.nbytes == KVCache([shape], kept, CPU).nbytes * store.slots // GROWTH


def test_float32_values_alone_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids = of("gemma4", None), prompt(3 * WINDOW, seed=3)[0]
    expected = tiny_model("gemma4")(ids[None]).logits[0]
    found = decoder.logits(decoder.forward(ids, decoder.new_cache()).last)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    monkeypatch.setattr(decoder, "_key_from_value", lambda layer: None)  # a cache that keeps both
    both = decoder.logits(decoder.forward(ids, decoder.new_cache()).last)
    assert torch.equal(both, found)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_changes_no_text_whatever_is_kept(family: str, kept: torch.dtype, temperature: float) -> None:
    decoder = of(family, kept, "int8")
    plain = decoded(decoder, NoDraft(), temperature)
    for script in SCRIPTS.values():
        assert decoded(decoder, ScriptedDrafter(plain, script, VOCAB), temperature) == plain


def test_full_layers_grow_by_blocks() -> None:
    assert [slots_for(n) for n in (1, GROWTH, GROWTH + 1, BLOCK + 1)] == [GROWTH, GROWTH, 2 * GROWTH, 2 * BLOCK]
    assert slots_for(30_000) - 30_000 < BLOCK
    assert slots_for(5000, 4096) == 4096 + BLOCK
