"""Tiny adapters (LoRA), and what they are compared with."""
