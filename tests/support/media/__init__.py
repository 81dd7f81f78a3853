"""Tiny multimodal models, and inputs as processors make them."""
