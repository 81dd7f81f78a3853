"""Commands about files: what models are here (`run.py models`, `show`), fetching and deleting them (`pull`, `remove`),
drafters for llama.cpp
(`export`); and what becomes of weights that were trained for 4 bits (`python -m eval.files.lattice`)."""
