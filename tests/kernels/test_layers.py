"""Whole layers in one native call against the same layers op by op: the same bits, in every family, on every
instruction set, whatever the storage, the number of rows and the number of threads.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specdec import kernels
from specdec.cache import KVCache
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.stack import Linear
from tests.support.native.kernel_paths import path, threads
from tests.support.native.needs_native import needs_library
from tests.support.tiny import FAMILIES, WINDOW, prompt, tiny_model
from tests.support.tiny_decoder import quantised

__all__ = ["path", "threads"]

pytestmark = needs_library
LENGTH = 6 * WINDOW
STORAGES = ("int4", "int8", "mixed")


def run(decoder: Decoder, ids: Tensor, rows: int, fused: bool, kept: torch.dtype | None = None) -> Tensor:
    """Hidden states [n, hidden] of `ids` [n], `rows` to a pass, from a fresh cache that keeps `kept`."""
    parts = (decoder.spec, decoder.embedding, decoder.layers, decoder.norm, decoder.head, decoder.per_layer)
    decoder = Decoder(*parts, kv_dtype=kept)
    store, parts = decoder.new_cache(), []
    assert decoder.stack._fused is not None
    assert decoder.stack._fused.usable([store.views]) is False  # gradients are on here
    if not fused:
        decoder.stack._fused = None
    for chunk in ids.split(rows):
        parts.append(decoder.forward(chunk, store).last)
        store.commit(len(chunk))
    return torch.cat(parts)


def op_by_op(decoder: Decoder, ids: Tensor, rows: int, kept: torch.dtype | None = None) -> Tensor:
    """`run` without the native call, on one thread: torch's small ops wait for a second one longer than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(decoder, ids, rows, False, kept)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_has_the_bits_of_op_by_op(family: str, storage: str) -> None:
    decoder, ids = quantised(family, storage), prompt(LENGTH, seed=4)[0]
    expected = op_by_op(decoder, ids, 16)
    assert expected.isfinite().all()
    for rows in (1, 2, 3, 7, 8, 9, 16, 17, 64):
        assert torch.equal(run(decoder, ids, rows, fused=True), expected), f"{rows} rows in a pass"


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gemma4-e2b", "gemma4-moe"])
def test_one_call_writes_the_stores_that_op_by_op_writes(family: str, kept: torch.dtype) -> None:
    decoder, ids = quantised(family, "int8"), prompt(LENGTH, seed=4)[0]
    expected = op_by_op(decoder, ids, 16, kept)
    for rows in (1, 5, 64):
        assert torch.equal(run(decoder, ids, rows, True, kept), expected), f"{rows} rows in a pass"
    whole = run(decoder, ids, 16, True)
    bar = 0.5 if decoder.spec.experts is None else 0.75  # rounded, a row may choose other experts
    assert 0 < (whole - expected).norm() < bar * whole.norm()  # another rounding, the same model


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gemma4-e2b", "gemma4-moe"])
def test_a_store_that_no_native_call_writes_goes_op_by_op(family: str, threads: int) -> None:
    decoder, ids = quantised(family, "int8"), prompt(LENGTH, seed=4)[0]
    expected = run(decoder, ids, 16, False, torch.float16)
    for rows in (1, 5, 64):
        assert torch.equal(run(decoder, ids, rows, True, torch.float16), expected), f"{rows} rows in a pass"
    whole = run(decoder, ids, 16, True)
    assert 0 < (whole - expected).norm() < 0.5 * whole.norm()


@pytest.mark.parametrize("family", ["qwen3", "gemma4", "gemma4-e2b", "gemma4-moe"])
def test_every_instruction_set_and_number_of_threads(path: str, threads: int, family: str) -> None:
    decoder, ids = quantised(family, "mixed"), prompt(LENGTH, seed=5)[0]
    if path == "reference":
        kernels.choose("native")
        expected = run(decoder, ids, 64, fused=True)
        kernels.choose("reference")
        assert kernels.fuse(decoder.layers, [0] * len(decoder.layers), decoder.norm) is None
        torch.set_num_threads(1)
        found = decoder.forward(ids[:64], decoder.new_cache()).last  # fused when it was made, op by op now
        # torch's exp rounds differently, and a last place can move an activation to the next of its 255 steps
        assert 0 < (found - expected[:64]).norm() < 0.05 * expected[:64].norm()
    else:
        found = run(decoder, ids, 13, fused=True)
        kernels.choose("native:portable")
        assert torch.equal(found, run(decoder, ids, 13, fused=True))


@pytest.mark.parametrize("family", ["llama", "gemma4-e2b", "gemma4-moe"])
def test_every_form_of_blocks_on_every_instruction_set(path: str, family: str) -> None:
    if path == "reference":
        return
    decoder, ids = quantised(family, "coded"), prompt(3 * WINDOW, seed=6)[0]
    found = run(decoder, ids, 5, fused=True)
    assert found.isfinite().all()
    assert torch.equal(found, run(decoder, ids, 48, fused=True))
    assert torch.equal(found, op_by_op(decoder, ids, 16))
    kernels.choose("native:portable")
    assert torch.equal(found, run(decoder, ids, 9, fused=True))


def test_what_is_not_in_blocks_goes_op_by_op() -> None:
    decoder = quantised("llama", "int4")
    layer = decoder.layers[0]
    assert kernels.fuse([layer], [0], decoder.norm) is not None
    dense = replace(layer, up=Linear(decoder_of(tiny_model("llama")).layers[0].up.weight))
    assert kernels.fuse([dense], [0], decoder.norm) is None
    assert kernels.fuse([replace(layer, input_norm=layer.input_norm.bfloat16())], [0], decoder.norm) is None
    assert kernels.fuse([layer], [0], decoder.norm.bfloat16()) is None
    ids = prompt(20)[0]
    mixed = Decoder(decoder.spec, decoder.embedding, [dense, *decoder.layers[1:]], decoder.norm, decoder.head)
    found = mixed.forward(ids, mixed.new_cache()).last
    close = decoder.forward(ids, decoder.new_cache()).last
    assert 0 < (found - close).abs().max() < 0.5  # other bits, the same layer


def test_a_cache_that_grows_is_read_where_it_is_now() -> None:
    decoder, ids = quantised("llama", "int8"), prompt(600, seed=6)[0]
    expected = op_by_op(decoder, ids, 60)
    assert torch.equal(run(decoder, ids, 50, fused=True), expected)  # the store moves at 256 and at 512 positions


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_many_texts_have_the_bits_of_each_alone(family: str, fused: bool) -> None:
    decoder = quantised(family, "mixed")
    decoder = Decoder(decoder.spec, decoder.embedding, decoder.layers, decoder.norm, decoder.head, decoder.per_layer)
    if not fused:
        decoder.stack._fused = None
    # texts of very different lengths, with passes of ragged rows of which some are forgotten again
    texts = [prompt(length, seed=length)[0] for length in (5, LENGTH, 3, 2 * WINDOW, WINDOW - 1)]
    alone = [run(decoder, text, 7, fused=True) for text in texts]
    caches, done = [decoder.new_cache() for _ in texts], [0] * len(texts)
    turn = 0
    while active := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        turn += 1
        rows = [texts[i][done[i] : done[i] + 1 + (turn * (i + 3)) % 9] for i in active]
        states = decoder.forward_many(rows, [caches[i] for i in active])
        for i, part in zip(active, states.last.split([len(r) for r in rows]), strict=True):
            assert torch.equal(part, alone[i][done[i] : done[i] + len(part)]), f"text {i} at {done[i]}"
            kept = max(1, len(part) - turn % 3)
            caches[i].commit(kept)
            done[i] += kept


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_many_texts_on_any_number_of_threads(count: int) -> None:
    decoder = quantised("gemma3", "int8")
    texts = [prompt(64 - 9 * i, seed=i)[0] for i in range(6)]
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found = decoder.forward_many(texts, [decoder.new_cache() for _ in texts]).last
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, torch.cat([decoder.forward(text, decoder.new_cache()).last for text in texts]))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4"])
def test_a_long_text_beside_short_ones_is_attended_to_by_all_threads(family: str, count: int) -> None:
    decoder, lengths = quantised(family, "int8"), (3, 400, 90, 1)
    texts = [prompt(length + 64, seed=length)[0] for length in lengths]
    caches = [prefilled(decoder, text[:length]) for text, length in zip(texts, lengths, strict=True)]
    rows = [text[length:][: 64 if length == 400 else 2] for text, length in zip(texts, lengths, strict=True)]
    alone = []
    for part, cache in zip(rows, caches, strict=True):
        alone.append(decoder.forward(part, cache).last)
        cache.commit(0)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found = decoder.forward_many(rows, caches).last
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, torch.cat(alone))


def prefilled(decoder: Decoder, ids: Tensor) -> KVCache:
    """Return a cache with ids [n] committed."""
    cache = decoder.new_cache()
    for chunk in ids.split(cache.max_rows):
        decoder.forward(chunk, cache)
        cache.commit(len(chunk))
    return cache
