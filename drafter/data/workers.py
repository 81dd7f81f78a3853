"""Work on numbered items in several threads, each of which takes the next item when it has room for one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

from specdec.util.threads import keep_to_one_thread

Given = TypeVar("Given")
Made = TypeVar("Made")


class _Failed(NamedTuple):
    error: BaseException


def in_workers(
    work: Callable[[Iterator[Given]], Iterator[Made]], items: Iterator[Given], workers: int, stopped: threading.Event
) -> Generator[Made, None, None]:
    """Run `work` on `items` in `workers` threads; yield all that every thread makes, as it comes.

    A caller that closes the iterator stops the threads, by way of `stopped`. Raises what a thread raises.
    """
    made: SimpleQueue[Made | _Failed | None] = SimpleQueue()
    lock = threading.Lock()

    def mine() -> Iterator[Given]:
        while not stopped.is_set():
            with lock:
                found = next(items, None)
            if found is None:
                return
            yield found

    def run() -> None:
        keep_to_one_thread()
        try:
            for item in work(mine()):
                made.put(item)
                if stopped.is_set():
                    break
        except BaseException as error:
            made.put(_Failed(error))
        finally:
            made.put(None)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        running = workers
        while running:
            item = made.get()
            if isinstance(item, _Failed):
                raise item.error
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
