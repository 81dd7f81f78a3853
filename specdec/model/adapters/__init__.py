"""Low-rank adapters (LoRA): read from PEFT folders and GGUF files, and laid beside a decoder's weights."""
