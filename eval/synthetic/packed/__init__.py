"""Checkpoints as other programs quantise them, written here: for tests, for `eval.fuzz`, and to try a loader."""
