"""`chosen`: Triton's kernels, chosen for tensors of the device that tests of them run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from specdec import kernels
from specdec.kernels import libraries

if TYPE_CHECKING:
    from specdec.kernels.triton import Triton


@pytest.fixture
def chosen() -> Iterator[Triton]:
    """Choose Triton's kernels until the test has ended."""
    from tests.support.triton.here import DEVICE, Triton  # skips where there is no Triton

    kernels.choose("triton")
    try:
        library = libraries._library_on(DEVICE)
        assert isinstance(library, Triton)
        yield library
    finally:
        kernels.choose(os.environ.get("SPECDEC_KERNELS", "native"))
