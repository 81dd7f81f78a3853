"""What a mixture's native pass calls while it runs: it names the experts that it reads next, and errors and interrupts
reach the caller."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.model.decoder import Decoder
from tests.support.native.needs_native import needs_library
from tests.support.tiny import prompt
from tests.support.tiny_decoder import quantised

pytestmark = needs_library


def states(decoder: Decoder, ids: Tensor, rows: int = 20) -> Tensor:
    """Hidden states [n, hidden] of `ids` [n], `rows` to a pass."""
    cache, parts = decoder.new_cache(), []
    with torch.inference_mode():
        for chunk in ids.split(rows):
            parts.append(decoder.forward(chunk, cache).last)
            cache.commit(len(chunk))
    return torch.cat(parts)


def routed(decoder: Decoder, pages: Any) -> Decoder:
    """The decoder, whose experts are kept by `pages`."""
    layers = [replace(layer, experts=replace(layer.experts, pages=pages)) for layer in decoder.layers]
    return Decoder(decoder.spec, decoder.embedding, layers, decoder.norm, decoder.head, decoder.per_layer)


@dataclass
class Asked:
    """Experts that a pass is about to read, layer by layer; `error` is raised in the first `times` layers."""

    said: list[tuple[int, tuple[int, ...], int]] = field(default_factory=list)
    error: BaseException | None = None
    times: int = 1

    def use(self, layer: int, experts: Sequence[int], parts_of: Callable[[int], tuple[Tensor, ...]]) -> None:
        self.said.append((layer, tuple(experts), sum(part.nbytes for e in experts for part in parts_of(e))))
        if self.error is not None and self.times:
            self.times -= 1
            raise self.error


def test_one_call_names_the_experts_that_op_by_op_names() -> None:
    ids, asked = prompt(40, seed=9)[0], (Asked(), Asked())
    fused, apart = (routed(quantised("gemma4-moe", "mixed"), pages) for pages in asked)
    assert fused.stack.fused is not None
    apart.stack._fused = None
    assert torch.equal(states(fused, ids, 9), states(apart, ids, 9))
    assert asked[0] == asked[1]
    assert len(asked[0].said) == 5 * len(fused.layers)
    assert all(list(experts) == sorted(set(experts)) and size for _, experts, size in asked[0].said)


@pytest.mark.parametrize("error", [OSError("no such page"), KeyboardInterrupt()])
def test_what_happens_while_experts_are_named_reaches_the_caller(error: BaseException) -> None:
    decoder, ids = quantised("gemma4-moe", "int8"), prompt(20)[0]
    expected = states(decoder, ids)
    asked = Asked(error=error)
    decoder = routed(decoder, asked)
    with torch.inference_mode(), pytest.raises(type(error)):
        decoder.forward(ids, decoder.new_cache())
    assert torch.equal(states(decoder, ids), expected)


def test_a_use_that_fails_in_every_layer_fails_one_pass_and_no_later_one() -> None:
    decoder, ids, asked = quantised("gemma4-moe", "int8"), prompt(20)[0], Asked(error=OSError("no such page"), times=99)
    failing = routed(decoder, asked)
    with torch.inference_mode():
        with pytest.raises(OSError, match="no such page"):
            failing.forward(ids, failing.new_cache())
        asked.times = 0
        later = failing.forward(ids, failing.new_cache()).last
    assert torch.equal(later, states(decoder, ids))


def test_an_error_reaches_the_thread_whose_pass_it_stopped() -> None:
    ids, turns, failed, ended = prompt(20)[0], threading.Barrier(2), threading.Event(), threading.Event()

    @dataclass
    class TwoTexts:
        """Lets the passes of two threads meet in the first layer, where the first's fails; the second's ends before."""

        first: int = 0

        def use(self, layer: int, experts: Sequence[int], parts_of: Callable[[int], tuple[Tensor, ...]]) -> None:
            if layer == 0:
                turns.wait(60)
            if threading.get_ident() != self.first:
                assert failed.wait(60)
            elif layer == 0:
                failed.set()
                raise OSError("the first thread's")
            else:
                ended.wait(60)

    pages = TwoTexts()
    decoder = routed(quantised("gemma4-moe", "int8"), pages)
    found: dict[str, Any] = {}

    def forward(name: str) -> None:
        if name == "first":
            pages.first = threading.get_ident()
        try:
            with torch.inference_mode():
                found[name] = decoder.forward(ids, decoder.new_cache()).last
        except OSError as error:
            found[name] = str(error)
        if name == "second":
            ended.set()

    thread = threading.Thread(target=forward, args=("first",))
    thread.start()
    forward("second")
    thread.join()
    assert found["first"] == "the first thread's"
    assert torch.equal(found["second"], states(quantised("gemma4-moe", "int8"), ids))


def test_an_interrupt_while_native_code_runs_is_raised_and_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """What Python raises for a signal when the library calls it, before the first line of the callback."""
    decoder, ids = routed(quantised("gemma4-moe", "int8"), Asked()), prompt(400)[0]

    def passes(delay: float) -> None:
        threading.Timer(delay, _thread.interrupt_main).start()
        for _ in range(300):
            decoder.forward(ids, decoder.new_cache())

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background ignores it
    raised = 0
    try:
        with torch.inference_mode():
            for delay in range(12):
                try:
                    passes(0.002 * delay)
                except KeyboardInterrupt:
                    raised += 1
    finally:
        signal.signal(signal.SIGINT, former)
    assert raised >= 9  # of 12: Python loses one that comes in a callback of its own, as of a thread that is gone
    assert "ctypes" not in capsys.readouterr().err
