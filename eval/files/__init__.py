"""Commands about files: `run.py export` writes a drafter for llama.cpp."""
