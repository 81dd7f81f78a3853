"""What a model, its drafter and a context take in memory, before any of it is loaded."""
