"""Run the ops of the decoder on a GPU, with kernels that Triton compiles."""
