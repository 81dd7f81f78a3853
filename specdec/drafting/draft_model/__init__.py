"""A smaller model as drafter: how it drafts, what it keeps of a text, whose tokens it knows."""
