"""Commands for users and for proofs: bench, exactness, answer, chat. Imports nothing itself: help is instant."""
