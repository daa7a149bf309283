"""The OpenAPI description, made from the types that parse requests: it can't say anything else than they do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

import pace
from pace.server.protocol.errors import ErrorBody

__all__ = ["describe"]

_REFERENCE = "#/components/schemas/{name}"


def describe(routes: Iterable[Any]) -> dict[str, Any]:
    """OpenAPI 3.1 of these routes.

    Args:
        routes: `app.Entry`s.
    """
    routes = list(routes)
    kinds = [kind for route in routes for kind in (route.body, route.answer) if kind is not None]
    _, components = msgspec.json.schema_components([*kinds, ErrorBody], ref_template=_REFERENCE)
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, route.path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "pace", "version": pace.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(route: Any, path: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "done"}
    if route.answer is not None:
        answer["content"] = {"application/json": {"schema": _reference(route.answer)}}
        if route.body is not None and "stream" in route.body.__struct_fields__:
            answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    failed = {"description": "failed", "content": {"application/json": {"schema": _reference(ErrorBody)}}}
    operation: dict[str, Any] = {
        "summary": (route.endpoint.__doc__ or "").strip().partition("\n")[0],
        "operationId": f"{route.method.lower()}_{path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}",
        "responses": {"200": answer, "4XX": failed, "5XX": failed},
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(route.body)}},
        }
    if "{name}" in path:
        operation["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}
