"""The ASGI application: which path is answered by which endpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pace.errors import PaceError
from pace.server import openapi
from pace.server.endpoints import models, operations, tokens
from pace.server.endpoints.chat import chat_completions
from pace.server.endpoints.completions import completions
from pace.server.endpoints.embeddings import embeddings
from pace.server.endpoints.messages import count_tokens, messages
from pace.server.endpoints.page import PAGE_PATHS, page
from pace.server.endpoints.responses import responses
from pace.server.gate import CLIENT_CLOSED, OPEN_PATHS, Gate, answer_to
from pace.server.http import Disconnected, error_response, json_response
from pace.server.protocol.chat import ChatCompletion, ChatRequest
from pace.server.protocol.common import ModelCard, ModelList
from pace.server.protocol.completions import Completion, CompletionRequest
from pace.server.protocol.embeddings import Embeddings, EmbeddingsRequest
from pace.server.protocol.errors import ApiError, api_error
from pace.server.protocol.messages import AnthropicMessage, CountTokensRequest, MessagesRequest, TokenCount
from pace.server.protocol.responses import ResponseObject, ResponsesRequest
from pace.server.protocol.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from pace.server.service import Service

__all__ = ["ROUTES", "Endpoint", "Entry", "make_app"]

Endpoint = Callable[[Service, HttpRequest], Awaitable[Response]]


MODEL_PATH = "/v1/models/"
"""What follows is a model's name, slashes and all."""


class Entry(NamedTuple):
    """A route: which request is answered by what, and the types of both."""

    method: str
    path: str
    endpoint: Endpoint
    body: type | None = None
    answer: type | None = None


async def description(service: Service, http: HttpRequest) -> Response:
    """This description."""
    return json_response(openapi.describe(ROUTES))


ROUTES: tuple[Entry, ...] = (
    Entry("POST", "/v1/completions", completions, CompletionRequest, Completion),
    Entry("POST", "/v1/chat/completions", chat_completions, ChatRequest, ChatCompletion),
    Entry("POST", "/v1/responses", responses, ResponsesRequest, ResponseObject),
    Entry("POST", "/v1/messages", messages, MessagesRequest, AnthropicMessage),
    Entry("POST", "/v1/messages/count_tokens", count_tokens, CountTokensRequest, TokenCount),
    Entry("POST", "/v1/embeddings", embeddings, EmbeddingsRequest, Embeddings),
    Entry("GET", "/v1/models", models.models, None, ModelList),
    Entry("GET", MODEL_PATH + "{name}", models.model, None, ModelCard),
    Entry("POST", "/tokenize", tokens.tokenize, TokenizeRequest, Tokenized),
    Entry("POST", "/detokenize", tokens.detokenize, DetokenizeRequest, Detokenized),
    Entry("GET", "/health", models.health),
    Entry("GET", "/health/live", models.live),
    Entry("GET", "/health/ready", models.ready),
    Entry("GET", "/ping", models.health),
    Entry("GET", "/version", models.version),
    Entry("GET", "/metrics", operations.metrics),
    Entry("GET", "/load", operations.load),
    Entry("GET", "/openapi.json", description),
    Entry("GET", "/v1/health", models.health),
    Entry("GET", "/v1/queue/status", operations.queue_status),
    Entry("GET", "/v1/server_metrics", operations.server_metrics),
    Entry("GET", "/v1/config", operations.config),
)


PAGE = tuple(Entry("GET", path, page) for path in PAGE_PATHS)
"""Not in the description: files are no API."""


def make_app(
    service: Service, *, access_log: bool = False, origins: Sequence[str] = (), has_page: bool = True
) -> ASGIApp:
    """The application of one service; it can be mounted into another ASGI application.

    Args:
        access_log: see `Gate`.
        origins: web pages of these may ask, from browsers.
        has_page: answer `/` with the page to chat.
    """
    entries = ROUTES + PAGE if has_page else ROUTES
    open_paths = OPEN_PATHS.union(PAGE_PATHS) if has_page else OPEN_PATHS
    gate = Gate(_Dispatcher(service, entries), service, access_log=access_log, open_paths=open_paths)
    if not origins:
        return gate
    return CORSMiddleware(gate, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])


class _Dispatcher:
    """Finds a request's endpoint. Exact paths: a redirected POST would lose its body.

    Starlette's own router and error handlers wrap every `send`: 3 us of each streamed token.
    """

    def __init__(self, service: Service, entries: Sequence[Entry]) -> None:
        self._service = service
        self._entries: dict[str, dict[str, Entry]] = {}
        for entry in entries:
            self._entries.setdefault(entry.path, {})[entry.method] = entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        if path.startswith(MODEL_PATH):
            scope["path_params"] = {"name": path.removeprefix(MODEL_PATH)}
            path = MODEL_PATH + "{name}"
        response = await self._answer(path, HttpRequest(scope, receive))
        await response(scope, receive, send)

    async def _answer(self, path: str, http: HttpRequest) -> Response:
        entries = self._entries.get(path)
        where = f"{http.method} {http.scope['path'][:200]}"
        if entries is None:
            return error_response(ApiError(404, f"{where}: there is no such path", code="not_found"), path)
        entry = entries.get("GET" if http.method == "HEAD" else http.method)
        if entry is None:
            allowed = ", ".join(entries)
            return error_response(
                ApiError(
                    405, f"{where}: expected {allowed}", code="method_not_allowed", headers={"allow": allowed}
                ),
                path,
            )
        http.scope["pace.route"] = entry.path
        try:
            return await entry.endpoint(self._service, http)
        except Disconnected:
            return Response(status_code=CLIENT_CLOSED)  # for the log; nobody reads it
        except PaceError as error:
            fields = getattr(entry.body, "__struct_fields__", ())
            return error_response(api_error(error, fields, getattr(entry.body, "engine_names", None)), path)
        except Exception as error:
            return error_response(answer_to(error, http.scope["pace.id"]), path)
