"""`run.py train`: its options, the command, its view."""
