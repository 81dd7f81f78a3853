"""Tiny models run on one thread, real ones on all that the other test processes leave: two threads cost a tiny model
more than they win. Files with real models come first, or the longest would run alone at the end.

Nothing that a test or one of its commands keeps goes into the user's cache folder: the suite has its own, into which
the real models are linked.

`folder` is a tiny model that converses, as commands take it; `tokenizer` one for tiny models that are made on the spot.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

# Before torch: its threads that wait would otherwise spin, on the processors that the other test processes need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Before Triton, which transformers imports: its interpreter runs the kernels for GPUs where there is none.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.weights.hub.paths import NAMED_MODELS, model_path
from tests.support.tiny import VOCAB
from tests.support.tiny_folder import make_folder, threads_restored

# pytest-xdist's workers have the environment that its first process has changed already.
USERS_CACHE = os.environ.setdefault("SPECDEC_USERS_CACHE", os.environ.get("SPECDEC_CACHE", ""))
CACHE = Path(tempfile.mkdtemp(prefix="specdec-tests-"))
os.environ["SPECDEC_CACHE"] = str(CACHE)  # commands that tests start have it too

ALL = torch.get_num_threads()
SHARE = max(1, ALL // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long = {item.path for item in items if item.get_closest_marker("model")}
    items.sort(key=lambda item: item.path not in long)  # stable: files stay whole


@cache
def link_real_models() -> None:
    """Link the named models into the suite's cache folder, fetched into the user's where they are not there yet."""
    with pytest.MonkeyPatch.context() as patch, suppress(ValueError):  # not to be had: the test itself says why
        if USERS_CACHE:
            patch.setenv("SPECDEC_CACHE", USERS_CACHE)
        else:
            patch.delenv("SPECDEC_CACHE")
        for file in map(model_path, NAMED_MODELS):
            for part in file.parent.glob(f"{file.name}*"):  # its stamp, without which it would be read through
                (CACHE / part.name).symlink_to(part)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("model"):
        link_real_models()


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(SHARE if request.node.get_closest_marker("model") else 1)
    yield
    torch.set_num_threads(ALL)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run: what fails once fails again."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with threads_restored():
        yield make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One printable character a token."""
    characters = [chr(30 + i) if i < 97 else chr(0x4E00 + i) for i in range(3, VOCAB)]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left"
    )
