"""The decoder: a spec, the families that make one, and the implementation that it describes."""
