"""The engine: every text in flight, one pass after another."""
