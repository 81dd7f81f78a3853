"""What draft lengths learned, in a file of the cache folder: read back, refused, bounded, and nothing to texts."""

from __future__ import annotations

import copy
import gc
import json
import os
from pathlib import Path

import pytest
import torch

import specdec
from specdec.drafting import learned as module
from specdec.drafting.calibrate import calibrate
from specdec.drafting.costs import CREDIT, Costs
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.learned import MOST_BYTES, LearnedFile, learned_file
from specdec.drafting.protocol import Drafted
from specdec.drafting.suffix import SuffixDrafter
from specdec.hf import decoder_of
from tests.support.tiny import tiny_model
from tests.support.tiny_folder import make_folder

SOURCE = "suffix"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def taught(right: int = 4) -> AdaptiveLength:
    lengths = AdaptiveLength(Costs({1: 1.0, 2: 1.1, 9: 1.8}, {SOURCE: 0.01}, {SOURCE: 0.02}, 0.05))
    assert lengths.claim(torch.get_num_threads(), 4)
    for _ in range(40):
        (_, k), *_ = lengths.plan([{SOURCE: 8}])
        lengths.observe([Drafted((SOURCE,) * k, min(k, right))], 0, 0.01 * k, 1 + 0.1 * k)
    return lengths


def file_of(identity: str = "suffix", family: str = "llama") -> LearnedFile:
    found = learned_file(decoder_of(tiny_model(family)), SuffixDrafter(), identity)
    assert found is not None
    return found


def test_what_was_learned_is_there_again(cache: Path) -> None:
    before, after = taught(), AdaptiveLength()
    file_of().write(before)
    assert [file.parent for file in cache.rglob("*.json")] == [cache / "learned"]
    assert file_of().read_into(after)
    assert after.costs.passes == pytest.approx(before.costs.passes) and after.costs.text == before.costs.text
    assert after.costs.steps == before.costs.steps and after.costs.starts == before.costs.starts
    assert after.measured_for == (torch.get_num_threads(), 4) and not after.claim(torch.get_num_threads(), 4)
    assert after.plan([{SOURCE: 8}]) == before.plan([{SOURCE: 8}]) and after.plan([{SOURCE: 8}])[0][1] >= 4
    assert 0 < after.learned().credit <= CREDIT


def test_other_machines_models_threads_kernels_and_drafters_have_other_files(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        file_of(),
        file_of("auto"),
        file_of("heads/mine"),
        file_of("heads/mine, trained on"),
        file_of(family="gemma3"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr("platform.node", lambda: "another")
        files.append(file_of())
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 61)
        files.append(file_of())
    with monkeypatch.context() as patched:
        patched.setattr("specdec.kernels.active", lambda device: "another instruction set")
        files.append(file_of())
    assert len({file.key for file in files}) == len(files) and file_of() == files[0]
    files[0].write(taught())
    files[0].path.rename(files[1].path)  # a file of something else under this name
    assert not files[1].read_into(AdaptiveLength())


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 1},
        {"costs": None},
        {"costs": {"passes": {"1": 1.0}, "steps": {}, "starts": {}, "text": None, "readings": {}}},
        {"costs": {"passes": {"1": -1.0, "2": 1.0}, "steps": {}, "starts": {}, "text": None, "readings": {}}},
        {"costs": {"passes": {"1": 1.0, "2": 1e999}, "steps": {}, "starts": {}, "text": None, "readings": {}}},
        {"measured_for": [2]},
        {"measured_for": None},
        {"credit": "much"},
        {"records": {SOURCE: {}}},
        {"records": {f"{i}": {} for i in range(99)}},
    ],
)
def test_a_damaged_file_is_as_good_as_none(damage: dict[str, object], cache: Path) -> None:
    file = file_of()
    file.write(taught())
    file.path.write_text(json.dumps(json.loads(file.path.read_text()) | damage))
    lengths = AdaptiveLength()
    assert not file.read_into(lengths)
    assert lengths.measured_for is None and not lengths.learned().records


@pytest.mark.parametrize("field", ["average", "seen", "drafted", "patience", "streaks", "exponent"])
@pytest.mark.parametrize("value", [-1, 1e9, float("nan"), "x", None])
def test_impossible_records_are_refused(field: str, value: object, cache: Path) -> None:
    file = file_of()
    file.write(taught())
    record = json.loads(file.path.read_text())
    if field == "exponent":
        record["records"][SOURCE][field] = value
    else:
        record["records"][SOURCE][field][0] = value
    file.path.write_text(json.dumps(record))
    assert not file.read_into(AdaptiveLength())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 9000, b" " * (MOST_BYTES + 1) + b"{}"])
def test_a_file_that_is_no_record_is_as_good_as_none(content: bytes, cache: Path) -> None:
    file = file_of()
    file.path.parent.mkdir(parents=True)
    file.path.write_bytes(content)
    assert not file.read_into(AdaptiveLength())


def test_a_folder_that_cannot_be_written_fails_no_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file, where the folder should be")
    file_of().write(taught())
    assert not file_of().read_into(AdaptiveLength())
    monkeypatch.setattr(module, "cache_folder", lambda: (_ for _ in ()).throw(FileNotFoundError("no home")))
    assert learned_file(decoder_of(tiny_model("llama")), SuffixDrafter(), "suffix") is None


def test_nothing_is_kept_of_costs_that_nobody_measured_and_old_files_go(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of().write(AdaptiveLength())
    assert not cache.exists()
    monkeypatch.setattr(module, "MOST_FILES", 2)
    for age, word in enumerate(("one", "two", "three")):
        file_of(word).write(taught())
        if file_of(word).path.exists():
            os.utime(file_of(word).path, (1e9 + age, 1e9 + age))
    kept = set((cache / "learned").iterdir())
    assert len(kept) == 2 and file_of("three").path in kept


def test_a_model_remembers_and_its_text_does_not_depend_on_it(cache: Path, tmp_path: Path) -> None:
    folder, ids = make_folder(tmp_path / "model"), torch.tensor([[5, 6, 7, 8] * 8])

    def text() -> tuple[list[int], bool]:
        model = specdec.load(folder, drafter="suffix", remember=True)
        known = bool(model.lengths.learned().records)
        row = model.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
        assert model.last_stats.drafted > 0 or not known
        del model
        gc.collect()
        return row, known

    plain = specdec.load(folder, drafter=None).generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
    assert not cache.exists() or not list((cache / "learned").glob("*"))
    assert [text(), text()] == [(plain, False), (plain, True)]
    (file,) = (cache / "learned").iterdir()
    record = json.loads(file.read_text())
    for right in (0.0, 1.0):  # records that say the opposite of each other
        changed = copy.deepcopy(record)
        for one in changed["records"].values():
            one["average"], one["seen"] = [right] * len(one["average"]), [24] * len(one["seen"])
        file.write_text(json.dumps(changed))
        assert text() == (plain, True)


def test_costs_that_were_kept_are_not_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, drafter = decoder_of(tiny_model("llama")), SuffixDrafter()
    file = learned_file(decoder, drafter, "suffix")
    assert file is not None
    file.write(calibrate(AdaptiveLength(), decoder, drafter))
    lengths = AdaptiveLength()
    assert file.read_into(lengths)
    monkeypatch.setattr("specdec.drafting.calibrate.measure_costs", lambda *_: pytest.fail("they are known"))
    calibrate(lengths, decoder, drafter)
