"""Rules for the source that no linter has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("specdec", "drafter", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES.append(ROOT / "run.py")

# What torch makes in its default dtype where none is named; a program may change that default, in any thread. Left out
# is what takes the dtype of something else: `zeros_like`, `x.new_empty`, and `as_tensor` of what a caller gives.
_FACTORIES = {
    *("empty", "zeros", "ones", "full", "rand", "randn", "linspace", "logspace", "eye", "tensor", "arange"),
    *("empty_strided", "empty_permuted", "scalar_tensor", "range", "normal", "complex", "hann_window"),
}
_MODULES = {"Linear", "Bilinear", "Embedding", "LayerNorm", "RMSNorm", "Conv1d", "Conv2d", "MultiheadAttention"}
_NEVER = {
    *("Tensor", "FloatTensor", "get_default_dtype", "set_default_dtype", "set_default_tensor_type"),
    *("set_default_device",),
}


def without_dtype(source: str) -> list[str]:
    """Return the calls in `source` that make a tensor in torch's default dtype, each with its line.

    `torch.arange` of whole numbers is int64 whatever the default is, but nothing shows that its arguments are whole.
    """
    tree = ast.parse(source)
    known = dict(_imported(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _default(_dotted(node.func, known), node):
            found.append((node.lineno, f"line {node.lineno}: {ast.unparse(node)}"))
    return [line for _, line in sorted(found)]


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What each imported name stands for: ("nn", "torch.nn"), whatever the file calls it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The full name of what is called, "" where it is no name."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, known)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def _default(name: str, call: ast.Call) -> bool:
    home, _, last = name.rpartition(".")
    if home == "torch" and last in _NEVER:
        return True
    makes = (home == "torch" and last in _FACTORIES) or (home.startswith("torch.nn") and last in _MODULES)
    return makes and not any(keyword.arg in ("dtype", None) for keyword in call.keywords)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_with_its_dtype(path: Path) -> None:
    found = without_dtype(path.read_text(encoding="utf-8"))
    where = path.relative_to(ROOT)
    assert not found, "\n".join(
        [f"{where} relies on torch's default dtype, which any thread may change; pass dtype=...", *found]
    )


@pytest.mark.parametrize(
    "call",
    [
        "import torch\ntorch.empty(3)",
        "import torch\ntorch.tensor([1])",
        "import torch as t\nt.full((2,), 0.5, device='cpu')",
        "from torch import zeros as blank\nblank(2)",
        "from torch import nn\nnn.Linear(2, 3)",
        "import torch\ntorch.nn.Embedding(2, 3)",
        "import torch\ntorch.Tensor([1.0])",
        "from torch import Tensor\nTensor(3)",
        "import torch\ntorch.set_default_dtype(torch.float32)",
    ],
)
def test_the_rule_finds_what_it_is_for(call: str) -> None:
    (found,) = without_dtype(call)
    assert found == f"line 2: {ast.unparse(ast.parse(call).body[1])}"


@pytest.mark.parametrize(
    "call",
    [
        "import torch\ntorch.zeros(2, dtype=torch.int8)",
        "import torch\ntorch.zeros(2, **options)",
        "x.new_empty(3)",
        "import numpy\nnumpy.empty(3)",
        "from torch import nn\nnn.Parameter(x)",
    ],
)
def test_the_rule_finds_nothing_else(call: str) -> None:
    assert without_dtype(call) == []
