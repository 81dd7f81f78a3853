"""The parts that OpenAI's chat and completions endpoints have in common."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.drafting.suffix import PREDICTION
from specdec.engine.telemetry import speculative_decoding
from specdec.server.body.objects import Fields
from specdec.server.errors import ApiError
from specdec.server.generation.answer import Answer, TokenLogprob
from specdec.server.http import event
from specdec.weights.token_bytes import vocabulary_bytes

DONE = "data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity


def new_id(prefix: str) -> str:
    """Return an id that nothing else has."""
    return f"{prefix}{secrets.token_hex(12)}"


def model_name(body: Fields, own: str) -> str:
    """Return the name that the reply has: the one that was asked for, since any will do."""
    return body.get("model") or own


def wants_usage(body: Fields) -> bool:
    """Return whether a stream ends with a chunk of counts."""
    options = body.get("stream_options")
    return options is not None and bool(options.get("include_usage"))


def usage(answer: Answer) -> dict[str, Any]:
    """Return the counts of an answer. Of its prediction, the tokens that were drafted are counted."""
    found = answer.usage
    drafted, accepted = answer.stats.draft_sources.get(PREDICTION, (0, 0))
    return {
        "prompt_tokens": found.prompt,
        "completion_tokens": found.completion,
        "total_tokens": found.prompt + found.completion,
        "prompt_tokens_details": {"cached_tokens": found.cached},
        "completion_tokens_details": {
            "reasoning_tokens": found.reasoning,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def figures(answer: Answer) -> dict[str, Any]:
    """Return what drafting did, as llama-server and vLLM name it."""
    return {
        "timings": answer.timings(),
        "metrics": {"speculative_decoding": speculative_decoding(answer.stats)},
    }


def failed(error: ApiError) -> str:
    """Return the event that ends a stream with an error."""
    return event(error.openai())


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return log probabilities in the shape of chat completions."""

    known = vocabulary_bytes(tokenizer)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = _piece(known, token)
        shown = raw.decode("utf-8", "replace")
        return {"token": shown, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(raw)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*alternative) for alternative in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: PreTrainedTokenizerBase, found: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Return log probabilities in the shape of completions. `offset`: characters before the first token."""
    known = vocabulary_bytes(tokenizer)
    shown = [_piece(known, one.token).decode("utf-8", "replace") for one in found]
    offsets = []
    for text in shown:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": shown,
        "token_logprobs": [max(one.logprob, _LEAST_LOGPROB) for one in found],
        "top_logprobs": [
            {
                _piece(known, token).decode("utf-8", "replace"): max(logprob, _LEAST_LOGPROB)
                for token, logprob in one.top
            }
            for one in found
        ],
        "text_offset": offsets,
    }


def _piece(known: Sequence[bytes], token: int) -> bytes:
    """Return the bytes of a token; none of one that the tokenizer does not have, as logits are often more."""
    return known[token] if token < len(known) else b""
