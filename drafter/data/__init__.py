"""What a head learns from: texts with the backbone's states, made, kept on disk and read back."""
