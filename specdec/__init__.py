"""specdec: multi-token-prediction speculative decoding, with the plain model's own output."""

from specdec.drafting import Draft, Drafter, NoDraft, SuffixDrafter
from specdec.hf import SpecdecForCausalLM, speculative
from specdec.load import load
from specdec.stats import GenerationStats, Round
from specdec.weights.hub import model_path
from specdec.weights.tokenizer import load_tokenizer

__all__ = [
    "Draft",
    "Drafter",
    "GenerationStats",
    "NoDraft",
    "Round",
    "SpecdecForCausalLM",
    "SuffixDrafter",
    "load",
    "load_tokenizer",
    "model_path",
    "speculative",
]
