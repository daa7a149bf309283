"""What every request passes before its endpoint: a request id, and an answer for every error."""

from __future__ import annotations

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pace.errors import PaceError, one_line
from pace.log import logger
from pace.server.http import Disconnected, error_response
from pace.server.protocol.errors import ApiError, api_error
from pace.server.service import Service

__all__ = ["Gate"]

OPEN_PATHS = ("/health", "/ping")
"""Paths below these say how the server is, to everybody and until the end."""

_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """Wraps the app; plain ASGI, because a layer that copies every chunk costs more than everything else."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number = scope["pace.id"] = _request_id(scope)
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            if self._service.is_draining and not _path(scope).startswith(OPEN_PATHS):
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            await self._app(scope, receive, send_with_id)
        except Disconnected:
            pass
        except Exception as error:
            answer = _answer_to(error, number)
            if not has_started:
                await error_response(answer)(scope, receive, send_with_id)


def _answer_to(error: Exception, number: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PaceError):
        return api_error(error)
    logger.error(
        "request %s failed: %s", number, one_line(f"{type(error).__name__}: {error}"), exc_info=error
    )
    return ApiError(
        500, "internal error; the server's log has it under this request id", code="internal_error"
    )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value.decode())
    return uuid.uuid4().hex


def _path(scope: Scope) -> str:
    """The path that is routed; the one of the request line, whatever the Host header says."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))
