"""The parts that every command shares: options, names, output, a loaded model, its figures, provenance."""
