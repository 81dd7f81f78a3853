"""Commands about files: what models are here (`run.py models`, `show`), fetching and deleting them (`pull`, `remove`),
and drafters for llama.cpp (`export`)."""
