"""The description says what the server does; schemathesis tries it (slow)."""

from __future__ import annotations

import json

import httpx
import pytest
from server.kit import Server

from pace.server import openapi
from pace.server.app import ROUTES


def test_every_route_and_field_is_described(server: Server) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    assert described == json.loads(json.dumps(openapi.describe(ROUTES)))
    for entry in ROUTES:
        operation = described["paths"][entry.path][entry.method.lower()]
        assert operation["summary"]
        if entry.body is not None:
            schema = described["components"]["schemas"][entry.body.__name__]
            assert set(schema["properties"]) == set(entry.body.__struct_fields__)
            assert schema["additionalProperties"] is False
    identifiers = [op["operationId"] for path in described["paths"].values() for op in path.values()]
    assert len(set(identifiers)) == len(identifiers) == len(ROUTES)


@pytest.mark.slow
def test_no_described_request_is_answered_with_5xx(server: Server) -> None:
    """At least 5000 cases that schemathesis makes of the description, valid and not."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    posts = [entry for entry in ROUTES if entry.body is not None]
    n_cases = 0
    for entry in posts:
        strategy = schema[entry.path][entry.method].as_strategy()

        @settings(
            max_examples=5000 // len(posts) + 1,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=strategy)
        def check(case: object) -> None:
            nonlocal n_cases
            n_cases += 1
            response = case.call(timeout=60)  # type: ignore[attr-defined]
            assert response.status_code < 500, response.text

        check()
    assert n_cases >= 5000
    assert httpx.get(f"{server.url}/health").status_code == 200
