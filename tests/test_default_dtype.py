"""torch.set_default_dtype, which any library in the process may call at any time, changes nothing that is computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from drafter.head_file import save_head
from drafter.initial import initial_tensors
from drafter.spec import HeadConfig, head_spec
from specdec import kernels
from tests.tiny import WINDOW, prompt, tiny_model

DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gemma4"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a head for it."""
    folder, head = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("head")
    tiny_model(request.param).save_pretrained(folder)
    decoder = specdec.load(folder, drafter=None, quantize="int8", device="cpu").decoder
    ids, config = torch.arange(128), HeadConfig.like(decoder.spec, draft_vocab=128)
    save_head(head, config, initial_tensors(head_spec(config, decoder.spec), decoder, ids), ids, decoder, {})
    return folder, head


def loaded(folders: tuple[Path, Path], quantize: str | None, kv_dtype: str | None) -> specdec.SpecdecForCausalLM:
    folder, head = folders
    return specdec.load(folder, drafter=str(head), quantize=quantize, kv_dtype=kv_dtype, device="cpu")


def texts(model: specdec.SpecdecForCausalLM) -> list[Any]:
    """Greedy and sampled, drafted and plain, past the sliding window; scores and logits of a forward pass."""
    ids = prompt(3 * WINDOW, seed=2)
    settings = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0, "reuse": False}
    sampled = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4}
    made: list[Any] = []
    for sampling in ({"do_sample": False}, sampled):
        for drafting in ({"speculation": False}, {"draft_length": 5}, {"drafter": "suffix"}, {}):
            made.append(model.generate(ids, **settings, **sampling, **drafting).tolist())
    logits = model(ids).logits
    assert logits.dtype is torch.float32
    return [*made, logits]


@pytest.mark.parametrize(("quantize", "kv_dtype"), [("int4", "int8"), ("int8", None), (None, "bfloat16")])
def test_load_and_generate_give_the_same_bits(
    folders: tuple[Path, Path], quantize: str | None, kv_dtype: str | None
) -> None:
    expected = texts(loaded(folders, quantize, kv_dtype))
    for dtype in DTYPES:
        with default_dtype(dtype):
            made = texts(loaded(folders, quantize, kv_dtype))
        assert made[:-1] == expected[:-1], dtype
        assert torch.equal(made[-1], expected[-1]), dtype


def test_another_thread_that_changes_the_default_meanwhile(folders: tuple[Path, Path]) -> None:
    model = loaded(folders, "int8", "int8")
    expected, stop = texts(model)[:-1], threading.Event()

    def others() -> None:
        while not stop.is_set():
            for dtype in DTYPES:
                torch.set_default_dtype(dtype)
        torch.set_default_dtype(torch.float32)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(3):
            assert texts(model)[:-1] == expected
    finally:
        stop.set()
        thread.join()
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("choice", ["reference", "native"])
def test_kernels_make_what_they_return_in_its_dtype(choice: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    packed = kernels.pack_blocks(
        torch.randint(0, 16, (48, 64), generator=generator), floats(48, 2).abs(), floats(48, 2), 4
    )
    x, q, k, v = floats(5, 64), floats(5, 4, 16), floats(2, 40, 16), floats(2, 40, 16)
    cos, sin, ids = floats(5, 16), floats(5, 16), torch.tensor([1, 7, 47], dtype=torch.int64)
    view = kernels.KVView(k, v)

    def results() -> list[Any]:
        return [
            kernels.block_linear(x, packed),
            kernels.block_linear(x.bfloat16(), packed),
            kernels.block_rows(ids, packed, torch.float32),
            kernels.attention(q, view, [0, 0, 1, 2, 3], [5, 6, 7, 8, 9], 0.25),
            kernels.rms_norm(x, floats(64) * 0 + 1, 1e-6),
            kernels.rms_norm(x, None, 1e-6),
            kernels.rope(q, cos, sin),
            kernels.gated(x, x, "silu"),
            kernels.gated(x, x, "gelu_tanh"),
            kernels.dense_linear(x, x, floats(5) * 0),
            *kernels.quantise_store(k),
            kernels.contenders(x[0], float(x[0].max()), -1.0, 3),
            torch.tensor(kernels.best(x[0])[0], dtype=torch.float32),
        ]

    try:
        kernels.choose(choice)
        expected = results()
        with default_dtype(dtype):
            made = results()
    finally:
        kernels.choose("native")
    for mine, right in zip(made, expected, strict=True):
        assert mine.dtype is right.dtype
        assert torch.equal(mine, right)
