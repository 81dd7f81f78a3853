"""GGUF files: the header, the blocks as a checkpoint, the tokenizer in the metadata."""
