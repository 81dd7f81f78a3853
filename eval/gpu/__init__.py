"""Build, check and time everything that runs on a GPU, in ten minutes on a bare machine: `python -m eval.gpu`."""
