"""What `/openapi.json` says of replies: as much as programs may count on. More fields may come."""

from __future__ import annotations

from specdec.server.body.kinds import Schema

_STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}


def _object(**properties: Schema) -> Schema:
    """Return the schema of an object that has all of `properties`."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _only(*values: str) -> Schema:
    return {"enum": list(values)}


_FINISH = _only("stop", "length", "tool_calls")
_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
    completion_tokens_details=_object(
        reasoning_tokens=_COUNT, accepted_prediction_tokens=_COUNT, rejected_prediction_tokens=_COUNT
    ),
)
_CALL = _object(id=_STRING, type=_only("function"), function=_object(name=_STRING, arguments=_STRING))
_MESSAGE = _object(role=_only("assistant"), content=_TEXT_OR_NULL)
_MESSAGE["properties"] |= {"reasoning_content": _STRING, "reasoning": _STRING, "tool_calls": _list(_CALL)}
_HEAD = {"id": _STRING, "created": _COUNT, "model": _STRING}
_FIGURES = {"timings": _object(cache_n=_COUNT, prompt_n=_COUNT, predicted_n=_COUNT), "metrics": {"type": "object"}}
_LOGPROBS: Schema = {"type": ["object", "null"]}
_MODEL = _object(id=_STRING, object=_only("model"), context_length=_COUNT, max_model_len=_COUNT)
_BLOCK = _object(type=_only("text", "thinking", "tool_use"))
_ITEM = _object(id=_STRING, type=_only("message", "reasoning", "function_call"), status=_only("completed"))

CHAT = _object(
    **_HEAD,
    object=_only("chat.completion"),
    choices=_list(_object(index=_COUNT, message=_MESSAGE, logprobs=_LOGPROBS, finish_reason=_FINISH)),
    usage=_USAGE,
    **_FIGURES,
)
COMPLETION = _object(
    **_HEAD,
    object=_only("text_completion"),
    choices=_list(_object(index=_COUNT, text=_STRING, logprobs=_LOGPROBS, finish_reason=_FINISH)),
    usage=_USAGE,
    **_FIGURES,
)
RESPONSE = _object(
    id=_STRING,
    object=_only("response"),
    created_at=_COUNT,
    status=_only("completed", "incomplete"),
    model=_STRING,
    output=_list(_ITEM),
    usage=_object(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT),
)
TURN = _object(
    id=_STRING,
    type=_only("message"),
    role=_only("assistant"),
    model=_STRING,
    content=_list(_BLOCK),
    stop_reason=_only("end_turn", "max_tokens", "tool_use", "stop_sequence"),
    stop_sequence=_TEXT_OR_NULL,
    usage=_object(input_tokens=_COUNT, cache_read_input_tokens=_COUNT, output_tokens=_COUNT),
)
COUNT = _object(input_tokens=_COUNT)
TOKENS = _object(tokens=_list(_COUNT), count=_COUNT, max_model_len=_COUNT)
TEXT = _object(content=_STRING, prompt=_STRING)
HEALTH = _object(status=_STRING)
MODEL = _MODEL
MODELS = _object(object=_only("list"), data=_list(_MODEL))
PROPS = _object(
    default_generation_settings=_object(n_ctx=_COUNT, params={"type": "object"}), total_slots=_COUNT, model_path=_STRING
)
VERSION = _object(version=_STRING)
ANY: Schema = {"type": "object"}

ERROR = _object(
    error=_object(message=_STRING, type=_STRING, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL),
)
ANTHROPIC_ERROR = _object(type=_only("error"), error=_object(type=_STRING, message=_STRING))
