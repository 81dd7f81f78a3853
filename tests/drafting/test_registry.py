"""What "auto" chooses: the head that comes with the package, for the backbone that it was trained for and no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import drafter
from drafter.config import MTPHeadConfig, head_spec
from drafter.files.head import HEAD_FILE, save_head
from drafter.train.initial import initial_tensors
from specdec.drafting import registry
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.registry import (
    CHECKPOINTS,
    GROUP,
    checkpoints,
    drafter_bytes,
    drafter_identity,
    resolve_drafter,
)
from specdec.drafting.suffix import SuffixDrafter
from specdec.hf import SpecdecForCausalLM, decoder_of
from tests.support.tiny import prompt, tiny_model
from tests.support.tiny_assistant import backbone


def save(folder: Path, family: str) -> None:
    decoder, ids = backbone(family), torch.arange(64)
    config = MTPHeadConfig.like(decoder.spec, draft_vocab=64)
    tensors = initial_tensors(head_spec(config, decoder.spec), decoder, ids)
    save_head(folder, config, tensors, ids, decoder, {"backbone_name": family})


def test_auto_is_the_head_of_this_backbone_or_suffix_matching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "one", "llama")
    save(tmp_path / "two", "gemma3")
    monkeypatch.setattr("drafter.files.bundled.HEADS", tmp_path)
    drafter.files.bundled._heads.cache_clear()
    try:
        auto = resolve_drafter("auto")
        for family, name in (("llama", "suffix+mtp"), ("qwen3", "suffix"), ("gemma3", "suffix+mtp")):
            auto.bind(backbone(family))
            assert auto.name == name and auto.max_draft > 0
        auto.bind(decoder_of(tiny_model("llama", seed=1)))
        assert auto.name == "suffix", "another model of the same shape"
        model = tiny_model("llama")
        ours = SpecdecForCausalLM(backbone("llama"), model.config, model.generation_config, resolve_drafter("auto"))
        plain, fixed = {"speculation": False}, {"draft_length": 2}  # how soon others would draft depends on the machine
        texts = [ours.generate(prompt(9), max_new_tokens=40, do_sample=False, **how) for how in (plain, fixed)]
        assert torch.equal(*texts) and "mtp" in ours.last_stats.draft_sources
    finally:
        drafter.files.bundled._heads.cache_clear()


def test_a_head_has_another_identity_once_it_was_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, decoder = tmp_path / "mine", backbone("llama")
    save(head, "llama")
    monkeypatch.setattr("drafter.files.bundled.HEADS", tmp_path)
    drafter.files.bundled._heads.cache_clear()
    try:
        before = [drafter_identity(word, decoder) for word in ("auto", str(head), head)]
        assert before == [drafter_identity(word, decoder) for word in ("auto", str(head), head)]
        assert before[0] != drafter_identity("auto", backbone("qwen3"))  # which has no head here
        assert before[0] != before[1] == before[2]
        written = (head / HEAD_FILE).stat().st_mtime_ns
        save(head, "llama")  # of the same size
        os.utime(head / HEAD_FILE, ns=(written, written + 1))
        after = [drafter_identity(word, decoder) for word in ("auto", str(head))]
        assert after[0] != before[0] and after[1] != before[1]
    finally:
        drafter.files.bundled._heads.cache_clear()


def test_drafters_without_weights_are_known_by_name_or_class() -> None:
    decoder, words = backbone("qwen3"), (None, "none", "suffix", SuffixDrafter())
    assert [drafter_identity(word, decoder) for word in words] == ["NoneType", "none", "suffix", "SuffixDrafter"]


@pytest.mark.parametrize("lacking", ["name", "max_draft", "aux_layers", "bind", "start"])
def test_an_object_that_lacks_a_part_of_a_drafter_is_refused_by_the_part(lacking: str) -> None:
    mine = SimpleNamespace(name="mine", max_draft=4, aux_layers=(), bind=print, start=print)
    assert resolve_drafter(mine) is mine
    both = CompositeDrafter(mine)
    delattr(mine, lacking)
    with pytest.raises(
        ValueError, match=rf"\(\) for none.* and '.*SimpleNamespace' object has no attribute '{lacking}'"
    ):
        resolve_drafter(mine)
    if lacking == "aux_layers":  # a composite passes on what its drafter wants
        with pytest.raises(ValueError, match="SimpleNamespace' object has no attribute 'aux_layers'"):
            resolve_drafter(both)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """What is registered to read checkpoints, for a test to change: nothing."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda **which: EntryPoints(found).select(**which))
    checkpoints.cache_clear()
    yield found
    checkpoints.cache_clear()


def test_this_project_registers_its_own_reader() -> None:
    (found,) = entry_points(group=GROUP, name=CHECKPOINTS)
    assert found.value == "drafter" and checkpoints() is drafter


def test_checkpoints_are_read_by_the_package_that_is_registered(registered: list[EntryPoint], tmp_path: Path) -> None:
    registered.append(EntryPoint("another", "no.such.module", GROUP))
    registered.append(EntryPoint(CHECKPOINTS, "tests.drafting.test_registry:Reader", GROUP))
    with pytest.raises(ValueError, match=r"\./suffix: there is no such file or folder"):
        resolve_drafter(Path("suffix"))
    for name in (str(tmp_path), tmp_path):
        assert resolve_drafter(name).name == f"read from {tmp_path}"
    assert drafter_bytes(str(tmp_path), torch.float32, False) == 12
    assert drafter_bytes("auto", torch.float32, False) == 34


@pytest.mark.usefixtures("registered")
def test_an_installation_without_a_reader_says_how_to_get_one(tmp_path: Path) -> None:
    for ask in (lambda: resolve_drafter(str(tmp_path)), lambda: drafter_bytes("auto", torch.float32, False)):
        with pytest.raises(ValueError, match=r"no package is registered .* pip install -e \."):
            ask()
    assert resolve_drafter("suffix").name == "suffix"


class Reader:
    """A package that reads checkpoints, as one class."""

    @staticmethod
    def open_drafter(name_or_path: str) -> SuffixDrafter:
        read = SuffixDrafter()
        read.name = f"read from {name_or_path}"
        return read

    @staticmethod
    def stored_bytes(name_or_path: str, dtype: torch.dtype, quantized: bool) -> int:
        return 12

    @staticmethod
    def largest_bundled_head() -> int:
        return 34
