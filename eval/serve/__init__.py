"""`run.py serve`: a server for agents and editors on this machine."""
