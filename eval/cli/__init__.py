"""What every command shares: options, names, output, a loaded model, its figures, where they come from."""
