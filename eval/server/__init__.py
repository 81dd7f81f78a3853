"""`python -m eval.server`: what serving costs, and whether answers are what requests want."""
