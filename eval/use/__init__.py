"""What chat and serve keep of a model's use with `--learn`, and `run.py learned`, which shows and deletes it."""
