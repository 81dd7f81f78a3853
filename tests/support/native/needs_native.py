"""Marks for tests of the native library: skipped where it is not there, but not where SPECDEC_REQUIRE_NATIVE says that
it must be, so that CI cannot pass by skipping them.
"""

from __future__ import annotations

import pytest

from specdec import kernels
from specdec.kernels import native

needs_library = pytest.mark.skipif(
    isinstance(native.load(), str) and not native.is_required(), reason="the native library was not built here"
)
needs_kernels = pytest.mark.skipif(
    not kernels.active().startswith("native") and not native.is_required(),
    reason="the native kernels are not in use here",
)
