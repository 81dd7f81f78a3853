"""The native library itself: parity of every instruction set with the reference, loading, and choosing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specdec import kernels
from specdec.kernels import KVView, native, reference
from tests.support.native.kernel_paths import CODED, KINDS, NATIVE, Kind, packed
from tests.support.native.needs_native import needs_library


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    kernels.choose(os.environ.get("SPECDEC_KERNELS", "native"))


@pytest.mark.parametrize("choice", NATIVE)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 64), (37, 96), (600, 576)])
def test_block_linear_has_the_bits_of_the_reference(choice: str, kind: Kind, rows: int, columns: int) -> None:
    kernels.choose(choice)
    w = packed(rows, columns, kind)
    few = kind in CODED and rows > 100  # the reference takes its time
    for count in (1, 3, 8, 12) if few else (*range(1, 18), 33, 130):
        x = torch.randn(count, columns) * torch.logspace(-5, 3, columns)[torch.randperm(columns)]
        x[count // 2, :32] = 0
        assert torch.equal(kernels.block_linear(x, w), reference.block_linear(x, w)), count


@pytest.mark.parametrize("choice", NATIVE)
def test_extreme_weights_and_activations(choice: str) -> None:
    """Largest integers (no saturation on the way), subnormal scales and activations, rows of zeros."""
    kernels.choose(choice)
    for bits, value in ((4, 15), (4, 0), (5, 31), (5, 0), (8, 127), (8, -128)):
        for sign in (1.0, -1.0):
            scale = torch.tensor([[6e-8, 1e-5, 65504.0]]).expand(16, 3)
            w = kernels.pack_blocks(torch.full((16, 96), value, dtype=torch.int64), scale, None, bits)
            x = torch.stack(
                [torch.full((96,), sign * size, dtype=torch.float32) for size in (1.0, 1e-38, 1e-29, 3e30, 0.0)]
            )
            assert torch.equal(kernels.block_linear(x, w), reference.block_linear(x, w))


@pytest.mark.parametrize("choice", NATIVE)
@pytest.mark.parametrize("kind", CODED, ids=str)
def test_extreme_codes_and_factors(choice: str, kind: Kind) -> None:
    kernels.choose(choice)
    scale = torch.tensor([[6e-8, 1e-5, 100.0]]).expand(16, 3)
    codes = [0, 2**kind.bits - 1] if kind.table is None else range(2**kind.bits)
    for value in codes:
        for factor in (0, 15, 240, 255) if kind.minimum else (-128, -1, 127):
            sub = None
            if kind.sub:
                sub = torch.full((16, 6), factor, dtype=torch.uint8 if kind.minimum else torch.int8)
                sub[:, 1::2] = 255 - factor if kind.minimum else -1 - factor  # of the other sixteen inputs
            minimum = -scale if kind.minimum else None
            values = torch.full((16, 96), value, dtype=torch.int64)
            w = kernels.pack_blocks(values, scale, minimum, kind.bits, table=kind.table, sub=sub)
            for sign in (1.0, -1.0):
                x = torch.stack(
                    [torch.full((96,), sign * size, dtype=torch.float32) for size in (1.0, 1e-38, 1e-29, 3e25, 0.0)]
                )
                assert torch.equal(kernels.block_linear(x, w), reference.block_linear(x, w))


@pytest.mark.parametrize("choice", NATIVE)
def test_norm_and_rope_have_the_bits_of_the_reference(choice: str) -> None:
    kernels.choose(choice)
    for width in (2, 6, 16, 18, 30, 32, 34, 64, 576, 640, 3840):
        x, weight, cos, sin = torch.randn(5, 3, width), torch.randn(width), *torch.randn(2, 5, width)
        assert torch.equal(kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
        assert torch.equal(kernels.rms_norm(x, None, 1e-6), reference.rms_norm(x, None, 1e-6))
        assert torch.equal(kernels.rope(x, cos, sin), reference.rope(x, cos, sin))


@needs_library
def test_instruction_sets_share_their_bits_where_torch_has_others() -> None:
    gate, up = torch.randn(2, 4, 1001) * 6
    q, k, v = torch.randn(3, 6, 40), torch.randn(2, 70, 40), torch.randn(2, 70, 72)
    lo, hi = [0, 60, 69], [33, 120, 139]
    results = []
    for choice in NATIVE:
        kernels.choose(choice)
        found = [kernels.gated(gate, up, name) for name in ("silu", "gelu_tanh")]
        results.append([*found, kernels.attention(q, KVView(k, v), lo, hi, 0.2)])
    expected = [reference.gated(gate, up, name) for name in ("silu", "gelu_tanh")]
    expected.append(reference.attention(q, KVView(k, v), lo, hi, 0.2))
    for result in results:
        for mine, first, torchs in zip(result, results[0], expected, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine, torchs, rtol=3e-6, atol=2e-6)


def test_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.choose("reference").startswith("torch reference")
    with pytest.raises(ValueError, match="native:portable"):
        kernels.choose("cuda")
    assert kernels.missing() is None
    if NATIVE:
        assert kernels.choose("native:portable").startswith("native portable, ")
        monkeypatch.setattr(kernels.libraries._compiled, "available", ("portable",))
        with pytest.raises(ValueError, match="this CPU has portable"):
            kernels.choose("native:avx2")


def test_a_library_that_is_missing_or_broken_is_a_reason(tmp_path: Path) -> None:
    missing = native.load(tmp_path)
    assert isinstance(missing, str)
    assert missing == "no native library was built here"
    (tmp_path / "_native.so").write_bytes(b"not a library")
    broken = native.load(tmp_path)
    assert isinstance(broken, str)
    assert "does not load" in broken


@pytest.mark.parametrize(("value", "warns"), [("reference", False), ("nonsense", True)])
def test_the_environment_chooses_at_import(value: str, warns: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from specdec import kernels; print(kernels.active())"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "SPECDEC_KERNELS": value},
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.startswith("torch reference") is (value == "reference" or not NATIVE)
    assert ("unknown kernels" in done.stderr) is warns
