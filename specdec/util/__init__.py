"""Helpers that every other package may use and that know none of them: files, text, terminals, threads, the heap."""
