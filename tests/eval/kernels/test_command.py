"""The kernel figures: their arithmetic, what is timed, and whole commands on tiny models. No time is asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from eval.kernels import bandwidth
from eval.kernels import cases as kernel_cases
from eval.kernels.bandwidth import Bandwidth, cache_bytes
from eval.kernels.cases import NAMES, ROWS, cases
from eval.kernels.command import main
from eval.kernels.model_pass import Decoding, bytes_per_pass, pass_costs, random_tokens
from eval.kernels.report import Series, decoding_dict, heading, series_table
from eval.kernels.timing import Effort, KernelTiming, Neighbours, alternate, busy_seconds
from eval.synthetic import full_size
from eval.synthetic.full_size import full_size_model
from specdec import kernels, load
from specdec.memory.plan import weight_bytes
from specdec.model.names import expected_tensors
from specdec.weights.tensors import BlockWeight
from tests.support.tiny import tiny_model
from tests.support.tiny_folder import make_folder

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and matrices of a size for tests."""
    monkeypatch.setattr(bandwidth, "BUFFER", MIB)
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda: 0)
    monkeypatch.setattr(kernel_cases, "last_level_cache", lambda: 0)
    monkeypatch.setattr(kernel_cases, "OUT_OF_CACHE", MIB)
    for name in ("MATRICES", "QUICK_MATRICES"):
        monkeypatch.setattr(kernel_cases, name, ((96, 64), (20, 32)))
    monkeypatch.setattr(kernel_cases, "ATTENTIONS", ((4, 2, 32, 24), (4, 1, 512, 24)))


class Clock:
    """A clock that calls move on."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log += name
            self.now += seconds

        return run


def test_calls_alternate_and_slow_ones_leave_early() -> None:
    clock = Clock()
    calls = {"fast": clock.call("f", 1.0), "slow": clock.call("s", 10.0)}
    timings = alternate(calls, Effort(least=2, most=9, seconds=5.0), clock=lambda: clock.now)
    assert clock.log == "fs" + "fssf" + "fff"  # a warm-up, there and back, and then the fast one up to 5 seconds
    assert timings == {"fast": KernelTiming((1.0,) * 5), "slow": KernelTiming((10.0,) * 2)}


def test_calls_that_take_no_time_end_at_the_limit() -> None:
    clock = Clock()
    timings = alternate({1: clock.call("a", 0.0)}, Effort(least=2, most=7, seconds=5.0), clock=lambda: clock.now)
    assert len(timings[1].seconds) == 7


def test_medians_ignore_the_odd_one_out() -> None:
    timing = KernelTiming((3.0, 1.0, 90.0, 2.0, 4.0))
    assert (timing.median, timing.fastest) == (3.0, 1.0)


def test_what_other_programs_use_is_all_but_ours(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 50 900 70 3 4 5 60 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    assert busy_seconds(stat.read_text(), ticks=100) == pytest.approx(1.72)
    neighbours = Neighbours(stat)
    quiet = neighbours.cores
    stat.write_text("cpu  900000 10 50 900 70 3 4 5 60 0\n")
    busy = neighbours.cores
    assert quiet == 0.0 and busy is not None and busy > 10
    assert Neighbours(tmp_path / "gone").cores is None


def test_figures_of_a_series() -> None:
    timings = {1: KernelTiming((2e-3, 1e-3, 3e-3)), 4: KernelTiming((3e-3,))}
    series = Series.of("block_linear", "big", timings, bytes_read=50_000_000, ceiling=50e9)
    one, four = (point.to_dict() for point in series.points)
    assert one == {
        "rows": 1,
        "us": pytest.approx(2000),
        "fastest_us": pytest.approx(1000),
        "repetitions": 3,
        "gb_per_second": pytest.approx(25.0),
        "share_of_bandwidth": pytest.approx(0.5),
        "ratio_to_one_row": 1.0,
    }
    assert four["ratio_to_one_row"] == pytest.approx(1.5)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(heading(series), series_table(series))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[0] == ["block_linear", "big:", "reads", "50.00", "MB"]
    assert lines[1] == ["T", "us", "GB/s", "of", "50", "GB/s", "V(T)/V(1)"]
    assert lines[2:] == [["1", "2,000", "25.0", "50%", "1.00"], ["4", "3,000", "16.7", "33%", "1.50"]]


def test_a_series_without_reads_or_one_row_has_no_such_figures() -> None:
    series = Series.of("rms_norm", "64", {4: KernelTiming((1e-6,))}, bytes_read=0, ceiling=50e9)
    point = series.points[0].to_dict()
    assert (point["gb_per_second"], point["share_of_bandwidth"], point["ratio_to_one_row"]) == (None, None, None)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(series_table(series))
    assert [line.split() for line in capture.get().splitlines()] == [["T", "us", "V(T)/V(1)"], ["4", "1.0", "-"]]


def test_decoding_as_a_share_of_the_bandwidth() -> None:
    decoding = Decoding(5, 64, 1.0, (0.25, 0.25, 1.25, 0.25))
    record = decoding_dict(decoding, bytes_read=10_000_000_000, ceiling=50e9)
    assert record["tokens_per_second"] == pytest.approx(2.0)
    assert record["share_of_bandwidth"] == pytest.approx(0.4)
    assert record["median_tokens_per_second"] == pytest.approx(4.0)
    assert record["median_share_of_bandwidth"] == pytest.approx(0.8)


def test_the_bandwidth_keeps_its_readings_and_names_the_best_reader() -> None:
    measured = Bandwidth(threads=2, size=MIB)
    again = measured.measure()
    assert len(measured.readings) == 2 and measured.readings[1] == again
    assert all(reading > 0 for reading in measured.readings)
    assert measured.reader in measured._readers()


def test_cache_sizes_as_linux_writes_them() -> None:
    assert [cache_bytes(text) for text in ("32768K\n", "1M", "512")] == [32 * MIB, MIB, 512]


def test_every_kernel_is_timed_on_data_that_it_accepts() -> None:
    names = set()
    for case in cases():
        names.add(case.kernel)
        for rows in case.rows:
            out = case.call(rows)()
            assert isinstance(out, torch.Tensor) and out.shape[0] == rows and bool(torch.isfinite(out).all())
    assert names == set(NAMES) == {name for name in NAMES if callable(getattr(kernels, name))}


def test_weights_and_keys_come_from_the_next_copy_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"block_linear": [], "attention": []}
    monkeypatch.setattr(kernels, "block_linear", lambda x, w: seen["block_linear"].append(w.q.data_ptr()))
    monkeypatch.setattr(kernels, "attention", lambda q, kv, *rest: seen["attention"].append(kv.keys.data_ptr()))
    for name, addresses in seen.items():
        case = next(cases(quick=True, only=frozenset([name])))
        calls = [case.call(1), case.call(4)]  # two numbers of rows share the rotation
        distinct = math.ceil(MIB / case.bytes_read)
        for i in range(2 * distinct):
            calls[i % 2]()
        assert len(set(addresses)) == distinct
        assert addresses[:distinct] == addresses[distinct:]


def test_no_more_query_rows_than_positions() -> None:
    case = next(cases(only=frozenset(["attention"])))
    assert case.rows == tuple(rows for rows in ROWS if rows <= 24)


def test_a_pass_is_timed_always_at_the_same_positions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load(folder, drafter=None, device="cpu").decoder
    passes = []
    honest = decoder.forward

    def watched(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        passes.append((cache.length, ids.tolist()))
        return honest(ids, cache)

    monkeypatch.setattr(decoder, "forward", watched, raising=False)
    timings = pass_costs(decoder, 40, (1, 4), Effort(least=2, most=2))
    assert {rows: len(timing.seconds) for rows, timing in timings.items()} == {1: 2, 4: 2}
    ids = random_tokens(decoder, 4).tolist()
    one, four = (40, ids[:1]), (40, ids)
    assert passes == [one, four, one, four, four, one]  # a warm-up and two repetitions
    with pytest.raises(ValueError, match="ask for a smaller --context"):
        pass_costs(decoder, 8190, (1, 4), Effort())


def test_a_separate_embedding_is_not_read_in_a_pass(tmp_path: Path) -> None:
    tied = load(make_folder(tmp_path / "tied", "llama"), drafter=None, device="cpu").decoder
    untied = load(make_folder(tmp_path / "untied", "llama-bias-untied"), drafter=None, device="cpu").decoder
    assert bytes_per_pass(tied) == tied.nbytes
    assert bytes_per_pass(untied) == untied.nbytes - 256 * 64 * 4


def test_the_command_on_a_tiny_model(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = ["--model", str(folder), "--threads", "1", "--quick", "--context", "40", "--json", str(file)]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert [series["name"] for series in record["series"]] == [
        *["block_linear"] * 14,
        "attention",
        *["rms_norm"] * 2,
        *["rope"] * 2,
        *["gated"] * 2,
        "block_rows",
        "model",
    ]
    assert [point["rows"] for point in record["series"][-1]["points"]] == [1, 2, 4, 8, 16]
    assert record["model"]["prefill_tokens"] == 512 and record["host"]["threads"] == 1
    assert len(record["bandwidth"]["readings_gb_per_second"]) == 1 + 22 + 2  # at first, after each kernel, two a pass
    assert "block_linear 96x64 4 bit, minimum: reads" in output and "prefill of 512 tokens" in output


def test_only_what_was_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--threads", "1", "--only", "rope", "gated", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {series["name"] for series in record["series"]} == {"rope", "gated"} and record["model"] == {}


def test_ctrl_c_keeps_what_was_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = alternate, []

    def impatient(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # the third kernel; each has its small and its large numbers of rows
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr("eval.kernels.command.alternate", impatient)
    assert main(["--quick", "--threads", "1", "--only", "block_linear", "--json", "-"]) == 130
    written, output = capsys.readouterr()
    record = json.loads(written)
    assert record["interrupted"] and len(record["series"]) == 2
    assert "interrupted: these are the figures that were taken" in output


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model("gemma4_unified").config
    assert isinstance(config, transformers.PreTrainedConfig)
    monkeypatch.setattr(full_size, "full_size_config", lambda name: config)


@pytest.mark.usefixtures("tiny_shape")
def test_random_weights_are_stored_as_int4_would_be() -> None:
    named: list[str] = []
    model = full_size_model("tiny", named.append)
    decoder = model.decoder
    assert sorted(named) == sorted(expected_tensors(decoder.spec))
    assert isinstance(decoder.embedding, BlockWeight) and decoder.embedding.blocks.bits == 8
    gate = decoder.layers[0].gate.weight
    assert isinstance(gate, BlockWeight) and gate.blocks.bits == 4 and gate.blocks.minimum is not None
    assert decoder.nbytes == weight_bytes(expected_tensors(decoder.spec), "int4", torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert bool(torch.isfinite(model(ids).logits).all())


@pytest.mark.usefixtures("tiny_shape")
def test_the_full_size_command_decodes_and_times_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--full-size", "gemma-4-12b", "--kv-dtype", "int8", "--threads", "1", "--json", "-"]) == 0
    written, output = capsys.readouterr()
    record = json.loads(written)
    assert record["model"]["kv_dtype"] == "int8"
    decoding = record["model"]["decoding"]
    assert (decoding["tokens"], decoding["prompt_tokens"]) == (32, 64)
    assert decoding["bytes_per_token"] == record["model"]["bytes_per_pass"] == record["model"]["weight_bytes"]
    assert [point["rows"] for point in record["series"][0]["points"]] == [1, 2, 4, 8]
    assert "plain decoding of 32 tokens after 64:" in output


@pytest.mark.usefixtures("tiny_shape")
def test_repetitions_are_those_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--full-size", "gemma-4-12b", "--adapter-rank", "2", "--repetitions", "3", "--quick", "--json", "-"]
    assert main(words) == 0
    written, output = capsys.readouterr()
    model, series = (json.loads(written)[name] for name in ("model", "series"))
    assert [(one["rows"], one["repetitions"]) for one in model["adapter"]["passes"]] == [(1, 3), (4, 3)]
    assert {point["repetitions"] for point in series[0]["points"]} == {3}
    assert "V(4) with an adapter of 2 ranks" in output


def test_user_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(folder / "gone"), "--only", "model"]) == 2
    assert main(["--model", str(folder), "--only", "model", "--context", "9000"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[0].startswith("error: ") and errors[-1].endswith("ask for a smaller --context")
