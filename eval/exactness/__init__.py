"""`python -m eval.exactness`: drafted text compared with plain text, token for token."""
