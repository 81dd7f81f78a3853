"""Chat formats: how models write turns, thinking and tool calls."""
