"""One server of the embedded model for all tests that do not hurt it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from server.kit import Server, running


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
