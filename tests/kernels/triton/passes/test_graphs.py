"""Passes that are captured and replayed: what is recorded when, what a replay reads, and what takes a graph away."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from specdec.kernels.triton.passes.graphs import Graphs, Tensors
from tests.support.triton.recorder import Recorder, refuse


class Store:
    def __init__(self, number: float) -> None:
        self.values, self.number = torch.zeros(3, dtype=torch.float32), numbers(number)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def write(graphs: Graphs, store: Store, x: Tensor, key: object = "write", captured: bool = True) -> list[float]:
    """Run a pass that writes x to a store; return what is in the store, with the store's number added."""
    values, number = store.values, store.number

    def launches(inputs: Tensors) -> Tensors:
        values.copy_(inputs[0].expand(3))
        return (values + number,)

    (found,) = graphs.run("pass", key, [store], (x,), launches, captured)
    assert store.values.tolist() == x.expand(3).tolist()
    result: list[float] = found.tolist()
    return result


def test_a_pass_runs_then_is_captured_and_then_replayed() -> None:
    recorder = Recorder()
    graphs, store = Graphs(recorder), Store(10)
    assert write(graphs, store, numbers(0, 0, 1)) == [10, 10, 11]
    assert recorder.captures == 0 and graphs.counts == {"pass eager": 1} and len(graphs) == 0
    assert write(graphs, store, numbers(5, 5, 6)) == [15, 15, 16]
    assert graphs.counts == {"pass eager": 1, "pass captured": 1, "pass replayed": 1} and len(graphs) == 1
    for i in range(3):
        assert write(graphs, store, numbers(i, 0, 0)) == [10 + i, 10, 10], "the inputs of this pass"
    assert graphs.counts["pass replayed"] == recorder.replays == 4 and recorder.captures == 1


def test_what_was_returned_stays_what_it_was() -> None:
    graphs, store = Graphs(Recorder()), Store(0)
    found = [
        graphs.run("pass", "key", [store], (numbers(i),), lambda inputs: (inputs[0] * 2,), True)[0] for i in range(5)
    ]
    assert torch.cat(found).tolist() == [0, 2, 4, 6, 8]


def test_each_key_store_and_shape_has_a_graph_of_its_own() -> None:
    graphs, stores = Graphs(Recorder()), [Store(0), Store(100)]
    for store in stores:
        for key in ("one", "other"):
            for x in (numbers(1, 2, 3), numbers(4)):
                for i in range(3):
                    assert write(graphs, store, x + i, key) == (x + i + store.number).expand(3).tolist()
    assert len(graphs) == 8
    assert graphs.counts == {"pass eager": 8, "pass captured": 8, "pass replayed": 16}


def test_a_graph_goes_with_a_store_that_it_reads() -> None:
    class Once(Recorder):
        """Replay nothing: as a CUDA graph, it keeps no store alive."""

        def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
            _, outputs = super().__call__(run)
            return (lambda: None), outputs

    graphs, store, other = Graphs(Once()), Store(0), Store(1)
    for _ in range(2):
        write(graphs, store, numbers(1, 1, 1))
        write(graphs, other, numbers(1, 1, 1))
    assert len(graphs) == 2
    del store
    gc.collect()
    write(graphs, other, numbers(1, 1, 1))
    assert len(graphs) == 1 and graphs.counts["pass captured"] == 2
    made = [Store(i) for i in range(20)]  # one of them may have the address of the one that is gone
    for one in made:
        assert write(graphs, one, numbers(0, 0, 0)) == [one.number] * 3, "its first pass is its own"


def test_only_so_many_graphs_are_kept() -> None:
    graphs, store = Graphs(Recorder(), most=2), Store(0)
    for key in ("a", "b", "a", "b", "c", "c"):
        write(graphs, store, numbers(1, 1, 1), key)
    assert len(graphs) == 2
    write(graphs, store, numbers(1, 1, 1), "b")
    assert graphs.counts["pass replayed"] == 4, "b was used after a, which went"


def test_what_cannot_be_captured_runs_as_it_is() -> None:
    graphs, store = Graphs(Recorder()), Store(0)
    for _ in range(3):
        assert write(graphs, store, numbers(1, 1, 1), captured=False) == [1, 1, 1]
    assert graphs.counts == {"pass eager": 3}


def test_after_a_capture_that_failed_everything_runs_as_it_is() -> None:
    graphs, store = Graphs(refuse), Store(0)
    write(graphs, store, numbers(1, 1, 1))
    with pytest.warns(UserWarning, match="passes are not captured any more: no memory for a graph$"):
        assert write(graphs, store, numbers(1, 1, 1)) == [1, 1, 1]
    for i in range(2):
        assert write(graphs, store, numbers(i, 1, 1)) == [i, 1, 1]
    assert graphs.refused == "no memory for a graph" and graphs.counts == {"pass eager": 4}


def test_launches_that_wait_for_the_device_are_refused() -> None:
    def launches(inputs: Tensors) -> Tensors:
        return (inputs[0] * float(inputs[0].sum()),)

    graphs, store = Graphs(Recorder()), Store(0)
    graphs.run("pass", "key", [store], (numbers(2),), launches, True)
    with pytest.warns(UserWarning, match="not captured any more: aten::_local_scalar_dense"):
        (found,) = graphs.run("pass", "key", [store], (numbers(2),), launches, True)
    assert found.tolist() == [4]


def test_ctrl_c_in_a_capture_leaves_nothing_half_made() -> None:
    class Interrupted(Recorder):
        def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
            if not self.captures:
                self.captures += 1
                raise KeyboardInterrupt
            return super().__call__(run)

    graphs, store = Graphs(Interrupted()), Store(0)
    write(graphs, store, numbers(1, 1, 1))
    with pytest.raises(KeyboardInterrupt):
        write(graphs, store, numbers(1, 1, 1))
    assert len(graphs) == 0 and graphs.refused == ""
    for i in range(2):
        assert write(graphs, store, numbers(i, 1, 1)) == [i, 1, 1]
    assert graphs.counts == {"pass eager": 1, "pass captured": 1, "pass replayed": 2}


def test_a_capture_that_failed_gives_back_the_memory_of_the_others() -> None:
    graphs, store = Graphs(Recorder()), Store(0)
    for _ in range(2):
        write(graphs, store, numbers(1, 1, 1))
    assert len(graphs) == 1
    graphs._capture = refuse
    write(graphs, store, numbers(1))
    with pytest.warns(UserWarning, match="no memory for a graph"):
        write(graphs, store, numbers(1))
    assert len(graphs) == 0, "none of them is replayed any more"


def test_what_was_captured_in_inference_mode_is_replayed_in_any() -> None:
    graphs, store = Graphs(Recorder()), Store(1)
    with torch.inference_mode():
        for _ in range(2):
            assert write(graphs, store, numbers(1, 1, 2)) == [2, 2, 3]
    with torch.no_grad():
        assert write(graphs, store, numbers(2, 3, 4)) == [3, 4, 5]
    assert graphs.counts["pass replayed"] == 2


def test_each_stream_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, store = Graphs(Recorder()), Store(0)
    for stream in (1, 2):
        monkeypatch.setattr("specdec.kernels.triton.passes.graphs._stream", lambda device, stream=stream: stream)
        for _ in range(2):
            write(graphs, store, numbers(1, 1, 1))
    assert graphs.counts == {"pass eager": 2, "pass captured": 2, "pass replayed": 2}


def test_launches_run_once_more_before_they_are_captured() -> None:
    """Triton may have to compile for the inputs' new addresses, which no capture allows."""
    made: list[str] = []

    class Told(Recorder):
        def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
            made.append("capture")
            return super().__call__(run)

    def launches(inputs: Tensors) -> Tensors:
        made.append("launch")
        return (inputs[0] + 1,)

    graphs, store = Graphs(Told()), Store(0)
    for _ in range(2):
        graphs.run("pass", "key", [store], (numbers(1),), launches, True)
    assert made[:4] == ["launch", "launch", "capture", "launch"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AttributeError("no such kernel"), OSError("ptxas")])
def test_whatever_a_capture_raises_leaves_the_launches(error: Exception) -> None:
    def fail(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        raise error

    graphs, store = Graphs(fail), Store(0)
    write(graphs, store, numbers(1, 1, 1))
    with pytest.warns(UserWarning, match="not captured any more"):
        assert write(graphs, store, numbers(1, 1, 1)) == [1, 1, 1]


def test_graphs_of_stores_that_are_gone_are_dropped_when_asked_for() -> None:
    class Once(Recorder):
        def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
            return (lambda: None), super().__call__(run)[1]

    graphs, store = Graphs(Once()), Store(0)
    for _ in range(2):
        write(graphs, store, numbers(1, 1, 1))
    del store
    gc.collect()
    assert len(graphs) == 1
    graphs.forget_gone()
    assert len(graphs) == 0


def test_inputs_of_another_type_are_another_pass() -> None:
    graphs, store = Graphs(Recorder()), Store(0)
    for x in (numbers(1, 2, 3), numbers(1.0001, 2, 3).double()):
        for _ in range(2):
            (found,) = graphs.run("pass", "key", [store], (x,), lambda inputs: (inputs[0] * 2,), True)
            assert torch.equal(found, x * 2) and found.dtype is x.dtype
    assert graphs.counts["pass captured"] == 2
