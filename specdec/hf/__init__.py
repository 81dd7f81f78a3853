"""transformers' face: the model that `specdec.load` makes, and the loop for a model that transformers loaded itself."""

from specdec.hf.borrowed import decoder_of, speculative
from specdec.hf.model import SpecdecForCausalLM

__all__ = ["SpecdecForCausalLM", "decoder_of", "speculative"]
