"""Items on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from specdec.server.errors import bad_request
from specdec.server.formats.base import Delta, ToolCallDelta
from specdec.server.generation.answer import Piece, TokenLogprob, together
from specdec.server.generation.mailbox import Mailbox

Test = Callable[[], Awaitable[None]]


def run(test: Test) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 10)

    asyncio.run(bounded())


def test_the_first_item_comes_at_once_and_the_next_ones_together_after_the_pause() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(0.2)
        threading.Timer(0.05, box.put, [1]).start()
        assert await box.fetch() == [1]
        began = time.monotonic()
        for item in (2, 3):
            box.put(item)
        threading.Timer(0.05, box.put, [4]).start()
        assert await box.fetch() == [2, 3, 4]
        assert time.monotonic() - began >= 0.15

    run(test)


def test_an_item_after_a_long_silence_comes_at_once() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(0.05)
        box.put(1)
        assert await box.fetch() == [1]
        put: list[float] = []
        threading.Timer(0.3, lambda: (put.append(time.monotonic()), box.put(2))).start()
        assert await box.fetch() == [2]
        assert time.monotonic() - put[0] < 0.04

    run(test)


@pytest.mark.parametrize("asleep", [True, False], ids=["while it is waited for", "before"])
def test_an_urgent_item_does_not_wait_for_the_pause(asleep: bool) -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(60)
        box.put(1)
        assert await box.fetch() == [1]
        box.put(2)
        if asleep:
            threading.Timer(0.05, box.put, [3, True]).start()
        else:
            box.put(3, urgent=True)
        assert await box.fetch() == [2, 3]

    run(test)


def test_many_items_from_a_thread_come_once_each_and_in_order() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(0.001)
        count = 5000
        threading.Thread(target=lambda: [box.put(i, i % 7 == 0) for i in range(count)]).start()
        found: list[int] = []
        while len(found) < count:
            found += await box.fetch()
        assert found == list(range(count))

    run(test)


def test_a_fetch_that_is_cancelled_loses_nothing() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(0.02)
        fetching = asyncio.ensure_future(box.fetch())
        await asyncio.sleep(0.01)
        fetching.cancel()
        box.put(1)
        assert await box.fetch() == [1]

    run(test)


def test_pieces_of_one_choice_become_one_and_an_error_stays_apart() -> None:
    def logged(token: int) -> TokenLogprob:
        return TokenLogprob(token, -1.0, ())

    failed = Piece(0, error=bad_request("no"))
    begun, more = Delta(tool_call=ToolCallDelta(0, "id", "f", "")), Delta(tool_call=ToolCallDelta(0, None, None, "{"))
    found = list(
        together(
            [
                Piece(0, [Delta(content="a")], [logged(1)]),
                Piece(0, [Delta(content="b"), begun], [logged(2)]),
                Piece(1, [Delta(reasoning="c")]),
                Piece(1, [Delta(reasoning="d")], finish="stop"),
                Piece(0, [more]),
                failed,
            ]
        )
    )
    assert found == [
        Piece(0, [Delta(content="ab"), begun], [logged(1), logged(2)]),
        Piece(1, [Delta(reasoning="cd")], finish="stop"),
        Piece(0, [more]),
        failed,
    ]
