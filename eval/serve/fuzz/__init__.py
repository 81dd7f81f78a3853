"""Damaged requests, and clients that leave, against a server with a tiny model: `python -m eval.serve.fuzz`."""
