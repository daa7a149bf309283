"""What is served, and whether it is: `/v1/models`, `/health` and its kin, `/version`."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import pace
from pace.server.http import json_response
from pace.server.protocol.common import ModelCard, ModelList
from pace.server.protocol.errors import ApiError
from pace.server.service import Service

__all__ = ["health", "live", "model", "models", "ready", "version"]


def _cards(service: Service) -> list[ModelCard]:
    info = service.info
    return [ModelCard(name, int(service.started_s), info.max_model_len, info.model) for name in service.names]


async def models(service: Service, http: HttpRequest) -> Response:
    """The models' names."""
    return json_response(ModelList(_cards(service)))


async def model(service: Service, http: HttpRequest) -> Response:
    """One of them."""
    name = service.check_model(http.path_params["name"])
    return json_response(next(card for card in _cards(service) if card.id == name))


async def health(service: Service, http: HttpRequest) -> Response:
    """200 while every engine runs, else 503 with the reason."""
    state = service.backend.health()
    if not state.ok:
        raise ApiError(503, state.reason, code="unhealthy")
    return json_response({"status": "ok"})


async def ready(service: Service, http: HttpRequest) -> Response:
    """200 while new requests are taken, else 503: what a load balancer asks."""
    state = service.backend.health()
    if service.is_draining or not state.ready:
        raise ApiError(503, state.reason or "the server is shutting down", code="not_ready")
    return json_response({"status": "ok"})


async def live(service: Service, http: HttpRequest) -> Response:
    """200: the process answers."""
    return json_response({"status": "ok"})


async def version(service: Service, http: HttpRequest) -> Response:
    """pace's version."""
    return json_response({"version": pace.__version__})
