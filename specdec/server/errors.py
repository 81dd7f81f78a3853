"""Errors that a client sees: a status, a sentence, and the words by which client libraries tell them apart."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

_log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
RETRY_AFTER = 2  # seconds, where a client may try again


@dataclass
class ApiError(Exception):
    """Report a request that is answered with an error. `param`: the field at fault; `code`: a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the reply."""
        headers = {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def openai(self) -> dict[str, Any]:
        """Return the body in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 and self.status not in _TYPES else self._kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """Return the body in Anthropic's shape."""
        kind = "api_error" if self.status >= 500 and self.status not in _TYPES else self._kind
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    @property
    def _kind(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a field that cannot be used."""
    return ApiError(400, message, param, code)


def too_long(tokens: int, context: int) -> ApiError:
    """Return the error for a prompt that leaves no room for an answer; the sentence is the one that clients parse."""
    return bad_request(
        f"This model's maximum context length is {context} tokens. However, your messages resulted in {tokens} tokens. "
        "Please reduce the length of the messages.",
        "messages",
        "context_length_exceeded",
    )


def of_status(status: int) -> ApiError:
    """Return the error for a status that the web framework found: 404, 405 and their like."""
    return ApiError(status, HTTPStatus(status).phrase, code=HTTPStatus(status).phrase.lower().replace(" ", "_"))


def of_exception(error: BaseException) -> ApiError:
    """Return the error of a generation that failed."""
    if isinstance(error, ApiError):
        return error
    _log.error("a generation failed", exc_info=error)
    return ApiError(500, f"the generation failed: {error or type(error).__name__}", code="generation_failed")
