"""Recorded drafts (`drafts.json`), how they are recorded, and their replay without a model."""
