"""Costs of kernels and of whole passes on this machine: `python -m eval.kernels`."""
