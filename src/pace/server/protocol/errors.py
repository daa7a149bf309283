"""Errors in OpenAI's shape: what the official clients turn into their exceptions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import msgspec

from pace.errors import (
    CapacityError,
    ChatTemplateError,
    EngineDeadError,
    PaceError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
)

__all__ = ["ApiError", "ErrorBody", "ErrorObject", "api_error"]

RETRY_AFTER_S = 1
"""What 429 and 503 advise; clients wait longer each time."""


class ErrorObject(msgspec.Struct):
    """What went wrong.

    Attributes:
        message: one line.
        type: invalid_request_error, authentication_error, not_found_error, rate_limit_error, server_error.
        param: the field of the request that it is about.
        code: for programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is no success."""

    error: ErrorObject


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message, param, code: as `ErrorObject`.
        type: as `ErrorObject`; None: what belongs to the status.
        headers: sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(ErrorObject(message, type or _TYPES.get(status, _kind(status)), param, code))
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S))


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def _kind(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


_STATUS: Mapping[type[PaceError], tuple[int, str | None]] = {
    RequestError: (400, None),
    PromptTooLongError: (400, "context_length_exceeded"),
    ChatTemplateError: (400, "chat_template_error"),
    CapacityError: (400, "context_length_exceeded"),
    QueueFullError: (429, "queue_full"),
    EngineDeadError: (503, "engine_dead"),
}


_PROMPT = re.compile(r"(?:prompt \d+: )?the (?:prompt|conversation) (?:has|is) ")
_PROMPTS = ("input", "prompt", "messages")
"""What requests call it."""


def api_error(
    error: PaceError, params: Collection[str] = (), engine_names: Mapping[str, str] | None = None
) -> ApiError:
    """The answer to an error of pace.

    Args:
        params: names of the request's fields; a message that begins with one is about it.
        engine_names: names of the engine's that the request has others for, which the message gets.
    """
    status, code = _STATUS.get(type(error), (500, None))
    message = str(error)
    first = message.split(" ", 1)[0].split("[", 1)[0].split(".", 1)[0]
    own = (engine_names or {}).get(first)
    if own is not None:
        message, first = own + message[len(first) :], own
    param = first if first in params else None
    if _PROMPT.match(message):
        param = next((name for name in _PROMPTS if name in params), None)
    return ApiError(status, message, param=param, code=code)
