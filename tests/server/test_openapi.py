"""The description says what the server does; schemathesis tries it (slow)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import httpx
import msgspec
import pytest
from server.kit import Server, running

from pace.server import openapi
from pace.server.app import ROUTES


def test_every_route_and_field_is_described(server: Server) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    assert described == json.loads(json.dumps(openapi.describe(ROUTES)))
    for entry in ROUTES:
        operation = described["paths"][entry.path][entry.method.lower()]
        assert operation["summary"]
        if entry.body is not None:
            assert issubclass(entry.body, msgspec.Struct)
            schema = described["components"]["schemas"][entry.body.__name__]
            assert set(schema["properties"]) == set(entry.body.__struct_fields__)
            assert schema["additionalProperties"] is False
    identifiers = [op["operationId"] for path in described["paths"].values() for op in path.values()]
    assert len(set(identifiers)) == len(identifiers) == len(ROUTES)


POSTS = [entry for entry in ROUTES if entry.body is not None]
N_CASES = 5000  # at least, of what the description allows
N_CASES_MORE = (
    800  # at least, of what it forbids; and as many in which what must be there is what a client sends
)

ORDINARY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "import"}],
    "input": "import",
    "prompt": "import",
    "tokens": [5, 6, 7],
    "max_tokens": 2,
    "model": "demo",
}
"""A made-up conversation, say, is nearly always one that has no role: what comes behind would hardly be tried."""


def ordinary(body: Any, case: Any) -> Any:
    """The case with ordinary values for what its route can't do without, whatever else it says."""
    required = [field.name for field in msgspec.structs.fields(body) if field.required]
    case.body |= {name: ORDINARY[name] for name in ["model", *required]}
    return case


def for_each(strategy: Any, n: int, check: Callable[[Any], None]) -> None:
    """Check n cases; one that fails is told as it was found."""
    from hypothesis import HealthCheck, Phase, given, settings

    @settings(
        max_examples=n,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=strategy)
    def run(case: Any) -> None:
        check(case)

    run()


def check_route(url: str, path: str) -> Counter[tuple[str, str, int]]:
    """Send a route's share of the cases; returns how many of each kind had which status."""
    import schemathesis

    (entry,) = (entry for entry in POSTS if entry.path == path)
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][entry.method]
    statuses: Counter[tuple[str, str, int]] = Counter()

    def check(kind: str, case: Any) -> None:
        response = case.call(timeout=60)
        statuses[path, kind, response.status_code] += 1
        assert response.status_code < 500, response.text

    described = operation.as_strategy()
    beyond = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    for kind, strategy, n in (
        ("described", described, N_CASES),
        ("ordinary", described.map(partial(ordinary, entry.body)), N_CASES_MORE),
        ("beyond", beyond, N_CASES_MORE),
    ):
        for_each(strategy, n // len(POSTS) + 1, partial(check, kind))
    return statuses


@pytest.mark.slow
def test_no_described_request_is_answered_with_5xx() -> None:
    """At least 5000 cases that schemathesis makes of the description, and more that go beyond it or are ordinary.

    An answer without a limit fills the context: a short one, or those answers are all that is waited for. Making a case
    takes longer than answering it, so several processes do; threads don't (hypothesis fails in them at random).
    """
    pytest.importorskip("schemathesis")
    with running("--max-model-len", "128") as server:
        check = partial(check_route, server.url)
        with ProcessPoolExecutor(len(POSTS), mp_context=get_context("fork")) as pool:
            statuses = sum(pool.map(check, [entry.path for entry in POSTS]), Counter())
        assert httpx.get(f"{server.url}/health").status_code == 200
    print(statuses.total(), "cases:", sorted(statuses.items()))
    assert sum(n for (_, kind, _), n in statuses.items() if kind == "described") >= N_CASES
    assert all(statuses[entry.path, "ordinary", 200] for entry in POSTS)
