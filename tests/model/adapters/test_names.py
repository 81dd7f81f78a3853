"""What adapters are called, and what cannot be a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specdec.model.adapters.adapter import check_name, name_of, named_adapters
from specdec.model.adapters.build import add_adapters
from tests.support.adapters.tiny_adapter import make_peft
from tests.support.tiny_decoder import of

FAMILY = "gemma3"


def test_names_of_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_of(tmp_path / "my adapter: two") == "my-adapter-two"
    assert name_of(Path("a/lora-Q8.gguf")) == "lora-Q8" and name_of(Path("a/adapter_model.safetensors")) == "a"
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "sub")
    assert [name_of(Path(path)) for path in (".", "..", "../../mine/", "~/a")] == ["sub", "mine", "mine", "a"]
    with pytest.raises(ValueError, match="path is empty"):
        named_adapters("")
    assert named_adapters(None) == {} and [*named_adapters("a/b")] == ["b"]
    assert [*named_adapters({"x": "a", "y": Path("b")})] == ["x", "y"]
    for name in ("", "none", "a:b", "a=b", "a b", "x" * 65, "a\n"):
        with pytest.raises(ValueError, match="cannot be the name of an adapter"):
            check_name(name)
    nonsense: list[Any] = [3, ["a"], {"a": 3}]
    for wrong in nonsense:
        with pytest.raises(ValueError, match="must be a path, or names"):
            named_adapters(wrong)
    decoder = of(FAMILY, None)
    add_adapters(decoder, {"a": make_peft(tmp_path / "a")})
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        add_adapters(decoder, {"a": tmp_path / "a"})
