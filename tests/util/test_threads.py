"""How many threads torch's ops take: told to one thread, it is not told to those that begin later."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import drafter
import specdec
from specdec.util.threads import keep_to_one_thread, one_torch_thread


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_new_thread(ask: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return found[0]


def test_a_pool_of_single_threads_leaves_later_threads_alone() -> None:
    with ThreadPoolExecutor(2, initializer=keep_to_one_thread) as pool:
        assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
        assert in_a_new_thread(torch.get_num_threads) == torch.get_num_threads() == 2
    assert in_a_new_thread(torch.get_num_threads) == 2


def test_a_narrowed_thread_leaves_later_threads_alone() -> None:
    def narrowed() -> int:
        with one_torch_thread():
            assert torch.get_num_threads() == 1
            inner = in_a_new_thread(torch.get_num_threads)
        assert torch.get_num_threads() == 2
        return inner

    assert narrowed() == in_a_new_thread(narrowed) == 2


def test_the_library_never_tells_the_whole_process() -> None:
    """A server's engine and a caller's thread begin after the weights were read: they once had one thread each."""
    for package in (specdec, drafter):
        root = Path(package.__file__ or "").parent
        for path in root.rglob("*.py"):
            names = [one.attr for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.Attribute)]
            if path != root / "util" / "threads.py":
                assert "set_num_threads" not in names, path
