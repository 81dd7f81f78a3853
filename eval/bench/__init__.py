"""`run.py bench`: plain and drafted decoding in turns, beside other engines; the figures and tables of a bench."""
