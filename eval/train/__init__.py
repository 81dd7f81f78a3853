"""`run.py train`: its options, the command, what it shows."""
