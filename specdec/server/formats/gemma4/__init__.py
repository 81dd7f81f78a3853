"""Gemma 4's chat format: turns, thoughts, calls and their results, all between tokens of their own."""
