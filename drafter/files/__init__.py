"""Heads on disk: read, written, bundled with the package; our own format and Gemma 4's assistants."""
