"""`run.py bench`: plain and drafted decoding in turns, other engines too, figures and tables of them."""
