"""Damaged files of every kind, each read in a process with limits: `python -m eval.fuzz`."""
