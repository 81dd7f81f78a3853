"""Matrices that other programs quantised: what safetensors files hold in place of a matrix of floats.

What: one file for each format, with a function that finds the format's matrices among the tensors of a checkpoint;
`find` asks all of them, `matrix` turns what was found into blocks. `lattice` is about floats that quantisation-aware
training left on the points of 4 bits; `experts` gathers the matrices of a mixture, which `.gguf` files store in
several ways too. Left out: names of models, which belong to `specdec.model`.
"""
