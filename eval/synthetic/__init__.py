"""Models of full size with random weights, and drafts that are right as often as one asks.

`python -m eval.synthetic` writes such a checkpoint.
"""
