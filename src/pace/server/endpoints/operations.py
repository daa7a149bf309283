"""What those who run the server look at: `/metrics`, `/load`, and AMD PACE's names for the same."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pace.server.http import json_response
from pace.server.metrics import CONTENT_TYPE
from pace.server.service import Service

__all__ = ["config", "load", "metrics", "queue_status", "server_metrics"]


async def metrics(service: Service, http: HttpRequest) -> Response:
    """For Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


async def load(service: Service, http: HttpRequest) -> Response:
    """How many prompts are being completed, as vLLM says it."""
    return json_response({"server_load": service.backend.n_calls})


async def queue_status(service: Service, http: HttpRequest) -> Response:
    """Who waits and who runs, as AMD PACE says it."""
    stats = service.backend.stats()
    return json_response(
        {
            "queue_size": sum(one.get("n_waiting", 0) for one in stats),
            "active_requests": service.backend.n_calls,
        }
    )


async def server_metrics(service: Service, http: HttpRequest) -> Response:
    """The counters of each engine, as JSON."""
    return json_response({"engines": service.backend.stats()})


async def config(service: Service, http: HttpRequest) -> Response:
    """The model and its cache."""
    info = service.info
    facts = {name: info.facts[name] for name in ("kv_cache_type", "kv_cache_dtype", "max_num_seqs")}
    return json_response({"model": info.model, "max_model_len": info.max_model_len, **facts})
