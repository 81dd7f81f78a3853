"""The ways in which clients say whether the model should think."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.server.body.bodies import CHAT, TURN
from specdec.server.conversation import read_options
from specdec.server.endpoints.messages import read_turns


@pytest.mark.parametrize(
    ("body", "thinks"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning": {"effort": "high"}}, True),
        ({"think": False}, False),
        ({"enable_thinking": True, "reasoning_effort": None}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "unheard of"}}, None),
        ({"thinking": True}, True),
        ({"think": "high"}, True),
    ],
)
def test_whether_it_thinks(body: dict[str, Any], thinks: bool | None) -> None:
    asked = {**body, "messages": [{"role": "user", "content": "x"}]}
    assert read_options(CHAT.read(asked, ""))["thinking"] is thinks
    turns = read_turns(TURN.read(asked, ""))
    assert turns.options["thinking"] is thinks
