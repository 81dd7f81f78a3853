"""The compiler's command on each system. On Linux it is run by every build; the others are compared as words."""

from __future__ import annotations

import pytest

from specdec.kernels.sources import compiler_commands, what_to_install

UNALIGNED = "-Wa,-muse-unaligned-vector-move"


def test_linux_and_macos_take_the_compiler_of_the_system_first() -> None:
    linux, macos = compiler_commands("linux", {}), compiler_commands("darwin", {})
    assert [command[0] for command in linux] == [command[0] for command in macos] == ["c++", "g++", "clang++"]
    for command in (*linux, *macos):
        assert {"-shared", "-fPIC", "-w", "-ffp-contract=off"} <= {*command} and "-static" not in command
        assert ("-pthread" in command) == (command in linux)


def test_windows_takes_clang_and_keeps_gccs_spills_unaligned() -> None:
    clang, gcc = compiler_commands("win32", {})
    assert (clang[0], gcc[0]) == ("clang++", "g++")  # "c++" could be either
    for command in (clang, gcc):
        assert "-static" in command and not {"-fPIC", "-pthread"} & {*command}
    assert UNALIGNED in gcc and UNALIGNED not in clang, "clang refuses the option, and needs none"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_a_compiler_that_is_named_is_the_only_one(platform: str) -> None:
    (command,) = compiler_commands(platform, {"CXX": "ccache clang++-19", "SPECDEC_CXXFLAGS": "-Wall -Werror"})
    assert command[:2] == ["ccache", "clang++-19"] and "-Wall" in command and "-w" not in command
    assert UNALIGNED not in command


def test_a_named_compiler_of_windows_may_have_backslashes() -> None:
    (command,) = compiler_commands("win32", {"CXX": r"'C:\Program Files\w64devkit\bin\g++.exe'"})
    assert command[0] == "C:/Program Files/w64devkit/bin/g++.exe" and UNALIGNED in command


def test_what_to_install() -> None:
    assert "MinGW" in what_to_install("win32") and "MinGW" not in what_to_install("linux") + what_to_install("darwin")
