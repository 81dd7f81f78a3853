"""`model`: a tiny Llama of a test's own, to be changed."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedModel

from tests.support.tiny import tiny_model


@pytest.fixture
def model() -> PreTrainedModel:
    return copy.deepcopy(tiny_model("llama"))
