"""What kernels and whole passes cost on this machine: `python -m eval.kernels`."""
