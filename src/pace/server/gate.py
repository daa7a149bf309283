"""What every request passes before its endpoint: its id, its key, limits; and an answer and a log line for everything."""

from __future__ import annotations

import json
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pace.console import err
from pace.errors import PaceError, one_line
from pace.log import logger
from pace.server.http import error_response
from pace.server.protocol.errors import ApiError, api_error
from pace.server.requests import REQUEST_ID
from pace.server.service import Service

__all__ = ["CLIENT_CLOSED", "OPEN_PATHS", "Gate", "answer_to"]

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
"""These say how the server is, to everybody and until the end; exactly these."""

CLIENT_CLOSED = 499  # what nginx logs where the client has left


class Gate:
    """Wraps the app; plain ASGI, because a layer that copies every chunk costs more than everything else.

    Args:
        app: what is behind.
        service: whose keys, limits and counters.
        access_log: write a line of JSON for each request to stderr; never what it says.
        open_paths: need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        *,
        access_log: bool = False,
        open_paths: frozenset[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._service = service
        self._access_log = access_log
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        number = scope["pace.id"] = _request_id(scope)
        # The one of the request line, whatever the Host header says.
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        begin_s = time.monotonic()
        status = 0
        n_bytes = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, n_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            else:
                n_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._admit(path, scope, receive, send_with_id)
        except Exception as error:
            answer = answer_to(error, number)
            if not status:
                await error_response(answer, path)(scope, receive, send_with_id)
        route = scope.get("pace.route", "other")
        self._service.metrics.responses[route, status] += 1
        if self._service.tracer is not None and scope["method"] == "POST":
            self._service.tracer.record(scope, status, time.monotonic() - begin_s)
        if self._access_log and path not in OPEN_PATHS:
            line = {
                "id": number,
                "method": scope["method"],
                "path": path[:200],
                "status": status,
                "seconds": round(time.monotonic() - begin_s, 4),
                "bytes": n_bytes + getattr(scope.get("pace.output"), "n_bytes", 0),
                "client": (scope.get("client") or ("",))[0],
            }
            err(json.dumps(line))

    async def _admit(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        if path in self._open_paths:
            await self._app(scope, receive, send)
            return
        key = service.keys.check(scope["headers"])
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if service.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        service.keys.open(key)
        try:
            await self._app(scope, receive, send)
        finally:
            service.keys.close(key)


def answer_to(error: Exception, number: str) -> ApiError:
    """The answer that an error becomes; one that nobody expected is logged under the request's id."""
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
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode())
    return uuid.uuid4().hex
