"""The fields of conversations: messages, tools and wishes about the answer, in each protocol's form.

Parts of content are told apart by their `type`; `specdec/server/media.py` reads those that are pictures and sound.
"""

from __future__ import annotations

from specdec.server.body.kinds import Either, Flag, Items, Text, Whole
from specdec.server.body.objects import AnyObject, Field, Object

EFFORTS = {"none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True, "max": True}
"""Words for how much a model should think, and whether it then thinks at all."""

_ROLES = Text(("system", "developer", "user", "assistant", "tool", "function"))
_FORMS = Text(("text", "json_object", "json_schema"))
_ARGUMENTS = Either(Text(), AnyObject())
_MEDIUM = Either(Text(), AnyObject())
PART = Object(
    "ContentPart",
    Field("type", Text()),
    Field("text", Text(), "of a part of text"),
    Field("refusal", Text()),
    Field("image_url", _MEDIUM, "a data URI, or an object with it as `url`"),
    Field("input_audio", _MEDIUM, "an object with `data` in base64"),
    Field("audio_url", _MEDIUM),
    Field("image", _MEDIUM),
    Field("audio", _MEDIUM),
    Field("source", AnyObject(), "an object with `data` in base64"),
)
_CONTENT = Either(Text(), Items(Either(Text(), PART), "parts"))

# Chat completions

_CALL = Object(
    "ToolCall",
    Field("id", Text()),
    Field(
        "function", Object("CalledFunction", Field("name", Text(), required=True), Field("arguments", _ARGUMENTS)), "",
        required=True,
    ),
)  # fmt: skip
_MESSAGE = Object(
    "Message",
    Field("role", _ROLES, "developer is system", required=True),
    Field("content", _CONTENT),
    Field("tool_calls", Items(_CALL, "calls")),
    Field("tool_call_id", Text()),
    Field("name", Text()),
    Field("reasoning_content", Text(), "the thought before the content"),
    Field("reasoning", Text(), "the same"),
    Field("refusal", Text()),
)
_FUNCTION = Object(
    "Function",
    Field("name", Text(), required=True),
    Field("description", Text()),
    Field("parameters", AnyObject(), "a JSON schema"),
    Field("strict", Flag(), "refuse a schema that no grammar can keep"),
)
_TOOL = Object(
    "Tool", Field("type", Text(), "other tools than functions are passed over"), Field("function", _FUNCTION)
)
_SCHEMA = Object(
    "JSONSchema", Field("name", Text()), Field("schema", AnyObject(), "a JSON schema"), Field("strict", Flag())
)
_RESPONSE_FORMAT = Object(
    "ResponseFormat",
    Field("type", _FORMS, required=True),
    Field("json_schema", _SCHEMA),
    Field("schema", AnyObject(), "a JSON schema, as llama-server takes it"),
)
_PREDICTION = Object(
    "Prediction", Field("type", Text(("content",))), Field("content", Either(Text(), Items(PART, "parts of text")))
)
PREDICTION = Field("prediction", _PREDICTION, "the answer that you expect, a file that is edited say")
PARALLEL = Field("parallel_tool_calls", Flag(), "false: at most one call")
MESSAGES = Field("messages", Items(_MESSAGE, "messages", least=1), "the conversation", required=True)
TOOLS = (
    Field("tools", Items(_TOOL, "tools"), "functions that may be called, their arguments by their schemas"),
    Field(
        "tool_choice",
        Either(Text(("auto", "none", "required", "any")), AnyObject()),
        "whether tools are called; an object names one, or those that are allowed",
    ),
    PARALLEL,
    Field("response_format", _RESPONSE_FORMAT, "JSON, by a schema: a grammar keeps the answer to it"),
)

# Responses

_ITEM = Object(
    "InputItem",
    Field("type", Text(), "message, function_call, function_call_output, reasoning; others are passed over"),
    Field("role", _ROLES),
    Field("content", _CONTENT),
    Field("name", Text()),
    Field("arguments", _ARGUMENTS),
    Field("call_id", Text()),
    Field("output", Either(Text(), Items(PART, "parts"), AnyObject())),
)
INPUT = (
    Field("input", Either(Text(), Items(_ITEM, "items")), "the conversation: a user's text, or items"),
    Field("instructions", Text(), "a system message before the others"),
    Field(
        "tools",
        Items(
            Object(
                "ResponseTool",
                Field("type", Text(), "other tools than functions are passed over"),
                Field("name", Text()),
                Field("description", Text()),
                Field("parameters", AnyObject(), "a JSON schema"),
                Field("strict", Flag()),
                Field("function", _FUNCTION, "the form of chat completions is taken too"),
            ),
            "tools",
        ),
        "functions that may be called, their arguments by their schemas",
    ),
    Field(
        "tool_choice",
        Either(Text(("auto", "none", "required", "any")), AnyObject()),
        "whether tools are called; an object names one, or those that are allowed",
    ),
    PARALLEL,
    Field(
        "text",
        Object(
            "TextOptions",
            Field(
                "format",
                Object(
                    "TextFormat",
                    Field("type", _FORMS),
                    Field("name", Text()),
                    Field("schema", AnyObject(), "a JSON schema"),
                    Field("strict", Flag()),
                ),
            ),
        ),
        "`format`: JSON, by a schema: a grammar keeps the answer to it",
    ),
)

# Messages

_BLOCK = Object(
    "ContentBlock",
    Field("type", Text(), "text, image, thinking, redacted_thinking, tool_use or tool_result"),
    Field("text", Text()),
    Field("thinking", Text()),
    Field("id", Text()),
    Field("name", Text()),
    Field("input", AnyObject()),
    Field("tool_use_id", Text()),
    Field("content", Either(Text(), Items(PART, "parts")), "of a tool's result"),
    Field("source", AnyObject(), "an object with `data` in base64"),
    Field("image_url", _MEDIUM),
    Field("image", _MEDIUM),
)
_TURN = Object(
    "Turn",
    Field("role", _ROLES, required=True),
    Field("content", Either(Text(), Items(_BLOCK, "blocks"))),
)
_FORMAT = Field("format", _RESPONSE_FORMAT)
TURNS = (
    Field("messages", Items(_TURN, "messages", least=1), "the conversation", required=True),
    Field("system", Either(Text(), Items(_BLOCK, "blocks")), "the system message"),
    Field(
        "tools",
        Items(
            Object(
                "MessagesTool",
                Field("type", Text(), "tools that run on Anthropic's servers are passed over"),
                Field("name", Text()),
                Field("description", Text()),
                Field("input_schema", AnyObject(), "a JSON schema"),
            ),
            "tools",
        ),
        "functions that may be called, their arguments by their schemas",
    ),
    Field(
        "tool_choice",
        Object(
            "MessagesToolChoice",
            Field("type", Text(("auto", "any", "tool", "none"))),
            Field("name", Text()),
            Field("disable_parallel_tool_use", Flag()),
        ),
        "`type`, `name` and `disable_parallel_tool_use`",
    ),
    Field("output_config", Object("OutputConfig", _FORMAT), "`format`: JSON, by a schema"),
    Field("output_format", _RESPONSE_FORMAT, "the same, as it was called before"),
)

# All of them

_EFFORT = Text(tuple(EFFORTS))
THINKING = (
    Field("reasoning_effort", _EFFORT, "whether the model thinks: not for none and minimal"),
    Field("reasoning", Object("Reasoning", Field("effort", _EFFORT)), "`effort`: the same"),
    Field(
        "thinking",
        Either(Object("Thinking", Field("type", Text()), Field("budget_tokens", Whole(0, 2**31 - 1))), Flag()),
        "whether the model thinks: `type` is enabled, adaptive or disabled; there is no budget",
    ),
    Field("enable_thinking", Flag(), "whether the model thinks"),
    Field("think", Either(Flag(), _EFFORT), "the same, as Ollama calls it"),
    Field("chat_template_kwargs", AnyObject(), "variables of the model's chat template, which count most"),
)
