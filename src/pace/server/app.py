"""The ASGI application: which path is answered by which endpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pace.errors import PaceError
from pace.server.endpoints import models, operations, tokens
from pace.server.endpoints.chat import chat_completions
from pace.server.endpoints.completions import completions
from pace.server.gate import CLIENT_CLOSED, Gate, answer_to
from pace.server.http import Disconnected, error_response
from pace.server.protocol.chat import ChatRequest
from pace.server.protocol.completions import CompletionRequest
from pace.server.protocol.errors import ApiError, api_error
from pace.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from pace.server.service import Service

__all__ = ["ROUTES", "Endpoint", "make_app"]

Endpoint = Callable[[Service, HttpRequest], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Endpoint, type | None], ...] = (
    # method, path, endpoint, type of the body
    ("POST", "/v1/completions", completions, CompletionRequest),
    ("POST", "/v1/chat/completions", chat_completions, ChatRequest),
    ("GET", "/v1/models", models.models, None),
    ("GET", "/v1/models/{name:path}", models.model, None),
    ("GET", "/health", models.health, None),
    ("GET", "/health/live", models.live, None),
    ("GET", "/health/ready", models.ready, None),
    ("GET", "/ping", models.health, None),
    ("GET", "/version", models.version, None),
    ("POST", "/tokenize", tokens.tokenize, TokenizeRequest),
    ("POST", "/detokenize", tokens.detokenize, DetokenizeRequest),
    ("GET", "/metrics", operations.metrics, None),
    ("GET", "/load", operations.load, None),
    ("GET", "/v1/health", models.health, None),
    ("GET", "/v1/queue/status", operations.queue_status, None),
    ("GET", "/v1/server_metrics", operations.server_metrics, None),
    ("GET", "/v1/config", operations.config, None),
)


def make_app(service: Service, *, access_log: bool = False, origins: Sequence[str] = ()) -> ASGIApp:
    """The application of one service; it can be mounted into another ASGI application.

    Args:
        access_log: see `Gate`.
        origins: web pages of these may ask, from browsers.
    """
    app = Starlette(routes=[_route(service, *route) for route in ROUTES])
    app.router.redirect_slashes = False  # a redirected POST loses its body
    app.add_exception_handler(HTTPException, _http_error)
    gate = Gate(app, service, access_log=access_log)
    if not origins:
        return gate
    return CORSMiddleware(gate, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])


def _route(service: Service, method: str, path: str, endpoint: Endpoint, kind: type | None) -> Route:
    fields = frozenset(getattr(kind, "__struct_fields__", ()))

    async def answer(http: HttpRequest) -> Response:
        http.scope["pace.route"] = path
        try:
            return await endpoint(service, http)
        except Disconnected:
            return Response(status_code=CLIENT_CLOSED)  # for the log; nobody reads it
        except PaceError as error:
            return error_response(api_error(error, fields))
        except Exception as error:
            return error_response(answer_to(error, http.scope["pace.id"]))

    return Route(path, answer, methods=[method])


def _http_error(http: HttpRequest, error: Any) -> Response:
    """What Starlette answers itself: there is no such path, or not with this method."""
    status = error.status_code
    message = (
        f"{http.method} {http.scope['path'][:200]} is not served here"
        if status in (404, 405)
        else str(error.detail)
    )
    return error_response(ApiError(status, message, code="not_found" if status == 404 else None))
