"""`run.py report`: records of a bench as one HTML page."""
