"""Skip the tests of Triton's kernels where it is not installed; tests/conftest.py turns its interpreter on."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
