"""Text in a terminal: `run.py generate` (one answer) and `run.py chat` (a conversation)."""
