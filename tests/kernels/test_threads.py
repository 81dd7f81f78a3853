"""The kernels' threads: as many as torch is told to use, right from any caller, asleep when there is nothing to do."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec import kernels
from specdec.kernels import BlockTensor, native, pack_blocks
from tests.support.native.needs_native import needs_library

pytestmark = [
    needs_library,
    pytest.mark.skipif(sys.platform == "win32", reason="the kernels have no threads there"),
]


@pytest.fixture(autouse=True)
def _native_kernels_and_torchs_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    kernels.choose("native")
    yield
    torch.set_num_threads(before)


def matrix() -> tuple[Tensor, BlockTensor]:
    """A product that is worth sharing between threads."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (1024, 512), generator=generator)
    scale, minimum = (torch.rand(1024, 16, generator=generator) for _ in range(2))
    return torch.randn(4, 512, generator=generator), pack_blocks(values, scale, minimum, 4)


def test_as_many_as_torch_is_told_and_none_of_openmps() -> None:
    library = native.load()
    assert isinstance(library, native.Native)
    text = library.path.read_bytes()
    assert b"libgomp" not in text and b"libomp" not in text
    for threads in (3, 1):
        torch.set_num_threads(threads)
        assert kernels.active().endswith(f"{threads} thread{'s' if threads > 1 else ''}")
    tasks = Path("/proc/self/task")
    if tasks.is_dir():
        x, w = matrix()
        torch.set_num_threads(4)
        kernels.block_linear(x, w)
        running = len(list(tasks.iterdir()))
        torch.set_num_threads(2)
        for _ in range(20):
            kernels.block_linear(x, w)
        assert len(list(tasks.iterdir())) <= running  # they are kept, not made for each call


def test_asleep_between_calls() -> None:
    x, w = matrix()
    torch.set_num_threads(4)
    for _ in range(50):
        kernels.block_linear(x, w)
    time.sleep(0.1)
    before = time.process_time()  # of all threads
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_callers_in_several_threads() -> None:
    x, w = matrix()
    torch.set_num_threads(2)
    wanted = kernels.block_linear(x, w)

    def many(_: int) -> bool:
        return all(torch.equal(kernels.block_linear(x, w), wanted) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))


def test_a_forked_child_has_threads_of_its_own() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    x, w = matrix()
    torch.set_num_threads(2)
    wanted = kernels.block_linear(x, w)
    child = os.fork()
    if child == 0:
        equal = all(torch.equal(kernels.block_linear(x, w), wanted) for _ in range(20))
        os._exit(0 if equal else 1)
    limit = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < limit, "the child waits for threads that it does not have"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
