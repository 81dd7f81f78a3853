"""Whole conversations as transformers' processor makes inputs of them: recorded, because it needs torchvision."""

from __future__ import annotations

import json

import pytest

from specdec.media.processor import Processor
from tests.support.media.conversations import conversations
from tests.support.media.reference import EXPECTED, inputs_of
from tests.support.media.tokenizer import MEDIA_TEMPLATE, media_tokenizer

RECORDED = json.loads(EXPECTED.read_text())["conversations"]


@pytest.mark.parametrize("name", RECORDED)
def test_text_and_every_number_are_those_of_transformers(name: str) -> None:
    processor = Processor(media_tokenizer(), MEDIA_TEMPLATE)
    assert inputs_of(processor, conversations()[name]) == RECORDED[name]


def test_no_conversation_is_left_out() -> None:
    assert RECORDED.keys() == conversations().keys()
