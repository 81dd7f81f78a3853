"""Trained drafters: heads that propose the backbone's next tokens from its own hidden state and K/V."""

from drafter.checkpoint import load_drafter
from drafter.propose import AssistantDrafter

__all__ = ["AssistantDrafter", "load_drafter"]
