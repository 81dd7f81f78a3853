"""The kernels as Triton's compiler makes them for GPUs that are not here: they compile, and the instructions keep the
arithmetic of the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.gpu

EXACT = {
    "quantise", "product", "block_rows", "rms_norm", "norm_quantise", "add_norm_quantise", "rope",
    "gated", "down", "up", "heads", "combine", "tops", "decide",
}  # fmt: skip
ROUNDED = {"dense", "attend", "likely", "exact"}
SHARED = 99 * 1024  # bytes of a program, in GPUs that people have at home


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_kernels_compile_and_nothing_is_fused_or_flushed(arch: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton.compiled", str(arch)],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in found} == EXACT | ROUNDED
    products = [each for each in found if each["kernel"] == "product"]
    assert {each["constants"]["GATED"] for each in products} == {False, True}
    for each in found:
        assert each["bytes"] > 0 and each["flushed"] == 0 and each["shared"] <= SHARED, each
        if each["kernel"] in EXACT:
            assert each["fused"] == 0, each
        if each["kernel"] == "attend":  # parts of bfloat16, on the matrix units
            assert each["matrix"] and all(".f32.bf16.bf16" in name for name in each["matrix"]), each
        if each["kernel"] == "product":  # whole numbers, on the matrix units
            assert each["matrix"] and all(".s32.s8.s8" in name for name in each["matrix"]), each
