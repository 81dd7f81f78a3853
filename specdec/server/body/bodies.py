"""The bodies of requests, and the fields that several of them have."""

from __future__ import annotations

from specdec.server.body.conversations import INPUT, MESSAGES, PREDICTION, THINKING, TOOLS, TURNS
from specdec.server.body.kinds import Either, Flag, Items, Number, Refused, Text, Whole
from specdec.server.body.objects import AnyObject, Field, Object, TokenNumbers

MOST_TOP_LOGPROBS = 20
MOST_CHOICES = 16
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_PROMPTS = 64
_TOKENS = Whole(-1, 2**31 - 1, nonzero=True)
_TOKEN_ID = Whole(0, 2**31 - 1)
_STOPS = Either(Text(), Items(Text(), "strings", most=MOST_STOPS))
_LIMIT = "the most tokens of the answer; -1, and left out: to the end of the context"
_MODEL = Field("model", Text(), "any name, which the reply repeats: there is one model; NAME:ADAPTER takes an adapter")
_STREAM = "events as the answer is written: at most 30 a second for each choice, and its end at once"
_ONE_CHOICE = Field("n", Whole(1, 1), "the protocol has one choice")

_SAMPLING = (
    Field("temperature", Number(0, 100), "0 is greedy. OpenAI's own server ends at 2; more makes sense with `min_p`"),
    Field("top_p", Number(0, 1), "draw among the likeliest tokens that together have this probability"),
    Field("top_k", Whole(-1, 2**31 - 1), "draw among so many tokens; 0 and -1: among all"),
    Field("min_p", Number(0, 1), "draw among tokens with this share of the likeliest one's probability"),
    Field("repetition_penalty", Number(0.01, 100), "of the text so far, the prompt too; 1 is none"),
    Field("repeat_penalty", Number(0.01, 100), "the same, as llama-server calls it"),
    Field("presence_penalty", Number(-2, 2), "lowers the scores of tokens that the answer has already"),
    Field("frequency_penalty", Number(-2, 2), "the same, for each time"),
    Field("logit_bias", TokenNumbers(MOST_BIASES), "is added to the scores of tokens, after a cut to -100 to 100"),
    Field("seed", Whole(-(2**63), 2**64 - 1), "the same seed gives the same text; left out, a new one is drawn"),
    Field("stop", _STOPS, "ends the answer, but not inside a call; nothing of it is part of the answer"),
    Field("stop_sequences", _STOPS, "the same, as Anthropic calls it"),
    Field("max_tokens", _TOKENS, _LIMIT),
    Field("max_completion_tokens", _TOKENS, _LIMIT),
    Field("max_output_tokens", _TOKENS, _LIMIT),
    Field("ignore_eos", Flag(), "go on to the limit, or to where a schema ends"),
    Field("store", Flag(), "false: the text is not kept to learn from, where the server was started with --learn"),
)
_ANSWER = (_MODEL, Field("stream", Flag(), _STREAM), *_SAMPLING)
_CHOICES = (
    Field("n", Whole(1, MOST_CHOICES), "choices; the i-th is the i-th row of a batch of `generate()`"),
    Field(
        "logprobs",
        Either(Flag(), Whole(0, MOST_TOP_LOGPROBS)),
        "log probabilities of the model, before any of these settings; a number: with so many alternatives",
    ),
    Field("top_logprobs", Whole(0, MOST_TOP_LOGPROBS), "alternatives, where `logprobs` is true"),
    Field(
        "stream_options",
        Object("StreamOptions", Field("include_usage", Flag())),
        "`include_usage`: a last chunk of counts",
    ),
)

CHAT = Object("ChatRequest", MESSAGES, *TOOLS, PREDICTION, *THINKING, *_ANSWER, *_CHOICES)
COMPLETION = Object(
    "CompletionRequest",
    Field(
        "prompt",
        Either(
            Text(),
            Items(Either(_TOKEN_ID, Text(), Items(_TOKEN_ID, "token ids", least=1)), "prompts or token ids", least=1),
        ),
        f"a text, token ids, or at most {MOST_PROMPTS} of these",
        required=True,
    ),
    Field("echo", Flag(), "the prompt comes before the text"),
    Field("suffix", Refused("is not supported: this model does not fill in the middle", ("",)), "not supported"),
    *_ANSWER,
    *_CHOICES,
)
RESPONSE = Object(
    "ResponseRequest",
    *INPUT,
    Field(
        "previous_response_id",
        Refused("cannot be used: nothing is kept between requests; send the whole conversation as input"),
        "nothing is kept between requests",
    ),
    *THINKING,
    *_ANSWER,
    _ONE_CHOICE,
    Field("top_logprobs", Whole(0, 0), "responses have no log probabilities here"),
    Field("user", Text(), "is repeated in the reply"),
    Field("metadata", AnyObject(), "is repeated in the reply"),
)
TURN = Object("MessagesRequest", *TURNS, *THINKING, *_ANSWER, _ONE_CHOICE)
COUNT = Object("CountRequest", _MODEL, *TURNS, *THINKING)
TOKENIZE = Object(
    "TokenizeRequest",
    Field("content", Text(), "a text, without special tokens, as llama-server takes it"),
    Field("add_special", Flag(), "with the tokens that begin a text, before `content`"),
    Field("prompt", Text(), "a text, with special tokens, as vLLM takes it"),
    Field("add_special_tokens", Flag(), "false: without the tokens that begin a text, before `prompt`"),
    Field(MESSAGES.name, MESSAGES.kind, MESSAGES.about),
    Field("add_generation_prompt", Flag(), "false: without the beginning of the answer"),
    *TOOLS,
    PREDICTION,
    *THINKING,
    _MODEL,
)
DETOKENIZE = Object("DetokenizeRequest", Field("tokens", Items(_TOKEN_ID, "token ids"), "token ids"), _MODEL)
