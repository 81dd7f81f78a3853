"""What learning from use is worth to one person: `python -m eval.from_use`."""
