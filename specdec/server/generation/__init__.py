"""From a prompt to an answer: the engine's thread, samplers, pieces of text, and what becomes of caches."""
