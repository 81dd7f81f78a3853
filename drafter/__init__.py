"""Trained drafters: heads that propose the backbone's next tokens from its own hidden state and K/V."""

from drafter.files.bundled import bundled_head, largest_bundled_head
from drafter.files.checkpoint import load_drafter, stored_bytes
from drafter.mtp_drafter import MTPDrafter

__all__ = ["MTPDrafter", "bundled_head", "largest_bundled_head", "load_drafter", "stored_bytes"]
