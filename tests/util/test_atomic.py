"""Files of the user's: links stay, devices and pipes are written to, modes are kept, nothing is left half written."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from specdec.util.atomic import is_foreign, replacing, user_path, write_text

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither these links nor these devices")


def test_a_link_stays_and_its_target_keeps_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("real")
    write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_link_to_nothing_makes_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("later")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "later").read_text() == "new"


def test_a_new_file_has_the_mode_that_any_program_gives(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "x")
    (tmp_path / "theirs").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    for write in (lambda: write_text(pipe, "words"), lambda: _streamed(pipe, "words")):
        reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
        reader.start()
        write()
        reader.join(10)
    assert heard == ["words", "words"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def _streamed(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_names_of_stdout_go_on_where_it_is(name: str, tmp_path: Path) -> None:
    if name == "link":
        (tmp_path / "link").symlink_to("/dev/stdout")
        name = str(tmp_path / "link")
    elif not Path(name).parent.exists():
        pytest.skip(f"no {name} on this system")
    code = (
        "import sys; from pathlib import Path; from specdec.util.atomic import replacing, write_text\n"
        "path = Path(sys.argv[1]); print('before'); write_text(path, 'one\\n'); print('between')\n"
        "with replacing(path) as temporary: temporary.write_text('two\\n')\n"
        "print('after')"
    )
    out = tmp_path / "out"  # as with > out: a regular file, which must not be replaced under the shell's descriptor
    with out.open("wb") as stream:
        subprocess.run([sys.executable, "-c", code, name], stdout=stream, check=True, timeout=60)
    assert out.read_text().split() == ["before", "one", "between", "two", "after"]


def test_devices_stay() -> None:
    write_text(Path("/dev/null"), "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_device_is_named() -> None:
    with pytest.raises(OSError, match="/dev/full"):
        write_text(Path("/dev/full"), "x")
    with pytest.raises(OSError, match="/dev/full"):
        _streamed(Path("/dev/full"), "x")


@contextlib.contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """Files of this process may not grow further, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    with at_most(1000), pytest.raises(OSError, match=r"out\.json"):
        write_text(path, "x" * 5000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


def test_a_loop_of_links_is_an_error_and_stays(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        write_text(loop, "x")
    assert loop.is_symlink()


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    write_text(tmp_path / ("é" * 127), "x")
    assert (tmp_path / ("é" * 127)).read_text() == "x"


def test_half_a_surrogate_pair_does_not_break_the_file(tmp_path: Path) -> None:
    write_text(tmp_path / "t", '"\udc80"')
    assert (tmp_path / "t").read_text() == '"\\udc80"'  # which is JSON's way to write it as well


def test_what_is_foreign(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert not is_foreign(path, lambda _: False)  # not there
    path.touch()
    assert not is_foreign(path, lambda _: False)  # empty
    path.write_text("x")
    assert is_foreign(path, lambda _: False)
    assert not is_foreign(path, lambda _: True)
    assert not is_foreign(Path("/dev/null"), lambda _: False)


def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/out.json") == tmp_path / "out.json"
    assert user_path("a/~/b") == Path("a/~/b")
    with pytest.raises(ValueError, match=r"no home folder is known for ~nobody-of-that-name; write the path out"):
        user_path("~nobody-of-that-name/x")


@pytest.mark.parametrize(("name", "complaint"), [("a\0b", "NUL"), ("x" * 5000, "5,000 characters")])
def test_names_that_no_file_can_have(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as raised:
        user_path(name)
    assert len(str(raised.value)) < 200 and "\0" not in str(raised.value)
