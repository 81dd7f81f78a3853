"""torch.set_default_dtype, which any library in the process may call at any time, changes nothing that is computed.

Bits are compared, and `Watching` sees every op of torch, so that a default which does not show in a text is found too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import specdec
from drafter.config import MTPHeadConfig, head_spec
from drafter.data.answering import generate_answers
from drafter.data.dataset import Dataset, DatasetWriter, frequent
from drafter.files.head import save_head
from drafter.settings import Recipe, TrainerSettings
from drafter.train.initial import initial_tensors
from drafter.train.loss import Candidates
from drafter.train.model import Network
from drafter.train.trainer import Trainer
from specdec import kernels
from specdec.kernels import records
from tests.support.native.kernel_paths import path  # noqa: F401  # a fixture
from tests.support.native.needs_native import needs_kernels
from tests.support.tiny import VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import backbone

DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Watching(TorchDispatchMode):
    """Fails at an op that makes a tensor in torch's default dtype, which no argument of the op is or names.

    A whole number divided by another one is such an op, and no list of factories would have it. Tensors without
    storage (the meta device) are let through: nothing is computed with them.
    """

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, default = op(*args, **(kwargs or {})), torch.get_default_dtype()
        given = [leaf.dtype if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs))]
        given = [dtype for dtype in given if isinstance(dtype, torch.dtype)]
        of_default = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.dtype is default and not t.is_meta]
        assert default in given or not of_default, f"{op} makes a tensor in torch's default dtype"
        return made


@pytest.fixture(scope="module", params=["llama", "gemma3", "gemma4"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a head for it."""
    folder, head = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("head")
    tiny_model(request.param).save_pretrained(folder)
    decoder = specdec.load(folder, drafter=None, quantize="int8", device="cpu").decoder
    ids, config = torch.arange(128), MTPHeadConfig.like(decoder.spec, draft_vocab=128)
    save_head(head, config, initial_tensors(head_spec(config, decoder.spec), decoder, ids), ids, decoder, {})
    return folder, head


def loaded(folders: tuple[Path, Path], quantize: str | None, kv_dtype: str | None) -> specdec.SpecdecForCausalLM:
    folder, head = folders
    return specdec.load(folder, drafter=str(head), quantize=quantize, kv_dtype=kv_dtype, device="cpu")


def texts(model: specdec.SpecdecForCausalLM) -> list[Any]:
    """Greedy and sampled, drafted and plain, past the sliding window; scores and logits of a forward pass."""
    ids = prompt(3 * WINDOW, seed=2)
    settings = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0, "reuse": False}
    sampled = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4}
    made: list[Any] = []
    for sampling in ({"do_sample": False}, sampled):
        for drafting in ({"speculation": False}, {"draft_length": 5}, {"drafter": "suffix"}):
            made.append(model.generate(ids, **settings, **sampling, **drafting).tolist())
    logits = model(ids).logits
    assert logits.dtype is torch.float32
    return [*made, logits]


@pytest.mark.parametrize(
    ("quantize", "kv_dtype", "dtypes"),
    [("int4", "int8", DTYPES), ("int8", None, DTYPES[1:]), (None, "bfloat16", DTYPES[:1])],
)
def test_load_and_generate_give_the_same_bits(
    folders: tuple[Path, Path], quantize: str | None, kv_dtype: str | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    expected = texts(loaded(folders, quantize, kv_dtype))
    for dtype in dtypes:
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
        assert texts(model)[:-1] == expected
    finally:
        stop.set()
        thread.join()
    assert torch.get_default_dtype() is torch.float32


def test_no_op_of_loading_and_answering_takes_the_default(folders: tuple[Path, Path]) -> None:
    with default_dtype(torch.float64), Watching():
        texts(loaded(folders, "int4", "int8"))


def test_the_watch_finds_what_it_is_for() -> None:
    counts = torch.tensor([1, 2], dtype=torch.int64)
    with default_dtype(torch.float64), Watching():
        assert torch.ones(2, dtype=torch.float64).dtype is torch.float64
        for make in (lambda: torch.ones(2), lambda: counts / 2, lambda: counts.sqrt()):
            with pytest.raises(AssertionError, match="default dtype"):
                make()


def trained(folder: Path) -> list[Any]:
    """Texts of the tiny llama with its states, by way of a file, and what some steps make of a head."""
    decoder, config = backbone("llama"), MTPHeadConfig.like(backbone("llama").spec, depth=1, draft_vocab=48)
    spec = head_spec(replace(config, bigram=4), decoder.spec)
    asked = [prompt(4 + i % 5, seed=i)[0] for i in range(6)]
    found = generate_answers(decoder, asked, layers=spec.reads, max_new_tokens=16, eos_ids=frozenset())
    folder.mkdir()
    DatasetWriter(folder, {}).add([text for _, text in found])
    ids, share = frequent(Dataset(folder), VOCAB, 48)
    begun = initial_tensors(spec, decoder, ids, (text for _, text in found))
    settings = TrainerSettings(Recipe(steps=2, deeper=0.5, soft=True), learning_rate=3e-3, batch_tokens=60, warmup=2)
    candidates = Candidates.of(ids, VOCAB, decoder.head.rows(ids, torch.float32))
    run = Trainer(Network(spec, begun), Dataset(folder), lambda t: decoder.embed(t).clone(), candidates, settings)
    reports = [run.step(i / 3) for i in range(3)]
    tensors = {**run.network.tensors(), "ids": ids}
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors.values())
    return [share, reports, {name: tensor.clone() for name, tensor in tensors.items()}]


def test_training_gives_the_same_bits(tmp_path: Path) -> None:
    share, reports, tensors = trained(tmp_path / "expected")
    for dtype in DTYPES:
        with default_dtype(dtype), Watching() if dtype is torch.float64 else nullcontext():
            made = trained(tmp_path / str(dtype))
        assert made[:-1] == [share, reports], dtype
        assert all(torch.equal(made[-1][name], tensor) for name, tensor in tensors.items()), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_make_what_they_return_in_its_dtype(path: str, dtype: torch.dtype) -> None:  # noqa: F811
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
            kernels.gumbel_candidates(x[0], float(x[0].max()), -1.0, 3),
            torch.tensor(kernels.best(x[0])[0], dtype=torch.float32),
        ]

    expected = results()
    with default_dtype(dtype), Watching():
        made = results()
    for mine, right in zip(made, expected, strict=True):
        assert mine.dtype is right.dtype
        assert torch.equal(mine, right)


def test_kernels_take_ids_of_any_whole_type(path: str) -> None:  # noqa: F811
    values = torch.randint(0, 16, (48, 64), generator=torch.Generator().manual_seed(0))
    packed = kernels.pack_blocks(values, torch.ones(48, 2, dtype=torch.float32), None, 4)
    ids = torch.tensor([1, 7, 47], dtype=torch.int64)
    expected = kernels.block_rows(ids, packed, torch.float32)
    assert torch.equal(kernels.block_rows(ids.int(), packed, torch.float32), expected)


@needs_kernels  # the reference takes what torch takes
def test_what_the_library_would_misread_does_not_reach_it(folders: tuple[Path, Path]) -> None:
    decoder = loaded(folders, "int8", None).decoder
    store = decoder.new_cache()
    with torch.inference_mode():
        ids = prompt(4)[0]
        fused, spans, texts = decoder.stack.fused, decoder.spans([(0, 4)]), [kernels.StoreRows(4, store.views, 0)]
        assert fused is not None
        x = decoder.embed(ids).clone()
        for wrong in (x.double(), x.bfloat16(), x.t().contiguous().t()):
            with pytest.raises(AssertionError):
                fused(wrong, spans, texts)
        turned = {kind: replace(span, cos=span.cos.double()) for kind, span in spans.items()}
        with pytest.raises(AssertionError):
            fused(x, turned, texts)
        assert fused(x, spans, texts)[0].isfinite().all()
    halves = torch.zeros(2, 8, 16, dtype=torch.float16)
    assert not records.readable(kernels.KVView(halves, halves))
    with pytest.raises(AssertionError):
        records.store_record(kernels.KVView(halves, halves))
    scores = torch.zeros(8, dtype=torch.float32)
    with pytest.raises(AssertionError):
        kernels.gumbel_candidates(scores, 0.0, -1.0, 3, torch.arange(8, dtype=torch.int32))


def test_a_cache_of_float16_goes_op_by_op(folders: tuple[Path, Path]) -> None:
    ids, settings = prompt(3 * WINDOW, seed=2), {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    model = loaded(folders, "int8", "float16")
    assert {store.values.dtype for store in model.decoder.new_cache().stores if store} == {torch.float16}
    plain = model.generate(ids, speculation=False, **settings)
    assert torch.equal(model.generate(ids, draft_length=4, **settings), plain)
