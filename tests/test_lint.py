"""Rules for the source that no linter has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What torch makes in its default dtype where none is named; a program may change that default, in any thread.
FACTORIES = {
    *("empty", "zeros", "ones", "full", "rand", "randn", "linspace", "logspace", "eye", "tensor", "arange", "Tensor"),
    *("empty_strided", "scalar_tensor", "range", "hann_window", "complex"),
}
SOURCES = [path for folder in ("specdec", "drafter", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]


def without_dtype(source: str) -> list[int]:
    """Lines of `source` that make a tensor in torch's default dtype: `torch.NAME(...)` without `dtype=`.

    `torch.arange` of whole numbers is int64 whatever the default is, but nothing shows that its arguments are whole.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = any(keyword.arg in ("dtype", None) for keyword in node.keywords)
            if of_torch and node.func.attr in FACTORIES and not named:
                lines.append(node.lineno)
            if of_torch and node.func.attr in ("get_default_dtype", "set_default_dtype"):
                lines.append(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_with_its_dtype(path: Path) -> None:
    lines = without_dtype(path.read_text(encoding="utf-8"))
    assert not lines, f"{path.relative_to(ROOT)}: lines {lines} make a tensor in torch's default dtype; say dtype=..."


def test_the_rule_finds_what_it_is_for() -> None:
    assert without_dtype("torch.empty(3)\ntorch.zeros(2, dtype=torch.int8)\nx.new_empty(3)\ntorch.tensor([1])") == [
        1,
        4,
    ]
