"""Drafting: the protocol, training-free drafters, the length of drafts, their costs, their names."""
