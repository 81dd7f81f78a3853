"""What a user runs and what proves it: bench, exactness, answer, chat. Imports nothing itself: help is instant."""
