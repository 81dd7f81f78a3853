"""Prompts: the bench's own, the suite, the foreign ones that judge drafters, and a user's file."""
