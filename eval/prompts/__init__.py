"""Prompts: the bench's own, the suite, those that drafters are judged on, and anyone's file."""
