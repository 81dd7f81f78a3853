"""Names are imported at their first use, and the collector is off meanwhile and no longer."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from specdec.util.lazy import import_uncollected, lazy


@pytest.fixture(params=[True, False])
def collecting(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the collector is on; there is a package `away` with a module that looks."""
    before = gc.isenabled()
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "__init__.py").touch()
    (tmp_path / "away" / "part.py").write_text("import gc\nfound = gc.isenabled()\n")
    (tmp_path / "away" / "broken.py").write_text("raise ImportError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()
    for name in [name for name in sys.modules if name.split(".")[0] == "away"]:
        del sys.modules[name]


def test_the_collector_is_off_during_an_import_and_then_as_before(collecting: bool) -> None:
    assert lazy("away", {"part": ("found",)})("found") is False
    assert gc.isenabled() is collecting
    with pytest.raises(ImportError, match="no"):
        import_uncollected("away.broken")
    assert gc.isenabled() is collecting


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match=r"module 'away' has no attribute 'nothing'"):
        lazy("away", {"part": ("found",)})("nothing")
