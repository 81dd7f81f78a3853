"""The memory that a model, its drafter and a context take, before any of it is loaded."""
