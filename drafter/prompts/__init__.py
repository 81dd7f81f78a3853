"""What to ask a backbone: a generator of prompts, its tables, and prompts from files."""
