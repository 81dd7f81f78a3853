"""The decoding loop, and what a round is made of: the choice of a token, acceptance, counts.

`sampling`, `verify` and `stats` know no drafter, so that drafters may import them; `engine` is above drafters.
"""
