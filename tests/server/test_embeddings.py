"""`/v1/embeddings` against the official client, and its corners against a scripted engine."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from server.kit import Server, scripted

from pace.llm import LLM
from pace.pooling_params import PoolingParams
from pace.server.wire import Done, Embedded, Event, Failed, Job

TEXTS = ["def f(x):", "import os", "class A:\n    pass"]


def vector(job: Job) -> list[list[Event]]:
    value = float(len(job.prompt or ""))
    return [[Embedded(job.id, 3, np.array([value, 0.5], "<f4").tobytes()), Done(job.id, 3, 0, 0)]]


def ask(**body: Any) -> httpx.Response:
    return scripted(vector, "POST", "/v1/embeddings", json=body)[0]


def test_embeddings_are_what_the_library_says(client: openai.OpenAI) -> None:
    with LLM("demo", threads=1) as llm:
        want = [one.outputs.embedding.tolist() for one in llm.embed(TEXTS)]
        mean = llm.embed(TEXTS[0], pooling_params=PoolingParams(pooling="mean", dimensions=8))[0]
        ids = llm.get_tokenizer().encode(TEXTS[1])
    got = client.embeddings.create(model="demo", input=TEXTS)  # asks for base64, as the client does
    assert [one.embedding for one in got.data] == want and [one.index for one in got.data] == [0, 1, 2]
    assert got.usage.prompt_tokens == got.usage.total_tokens > 0
    got = client.embeddings.create(model="demo", input=TEXTS[0], encoding_format="float")
    assert got.data[0].embedding == want[0]
    got = client.embeddings.create(model="demo", input=[ids, ids])
    assert [one.embedding for one in got.data] == [want[1]] * 2
    got = client.embeddings.create(
        model="demo", input=TEXTS[0], dimensions=8, extra_body={"pooling": "mean"}, encoding_format="float"
    )
    assert got.data[0].embedding == mean.outputs.embedding.tolist()


def test_the_wire_format() -> None:
    body = ask(input="abc").content
    assert body == (
        b'{"data":[{"index":0,"embedding":[3.0,0.5],"object":"embedding"}],"model":"scripted",'
        b'"usage":{"prompt_tokens":3,"total_tokens":3},"object":"list"}'
    )
    data = ask(input=["abc"], encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(data), "<f4").tolist() == [3.0, 0.5]


def test_thousands_of_inputs_come_in_order_and_never_fill_the_queue() -> None:
    """LangChain sends 1000 at a time."""
    response, backend = scripted(
        vector, "POST", "/v1/embeddings", json={"input": ["x" * (i % 7 + 1) for i in range(1000)]}
    )
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(1000))
    assert [one["embedding"][0] for one in data] == [i % 7 + 1 for i in range(1000)]
    assert response.json()["usage"]["prompt_tokens"] == 3000
    assert backend.n_calls == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "add_special_tokens": False}, "add_special_tokens"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "colour": 1}, "colour"),
        ({}, "input"),
    ],
)
def test_bad_requests_are_named(body: dict[str, Any], param: str) -> None:
    response = ask(**body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param or param in error["message"]


def test_a_failed_embedding_is_no_success() -> None:
    response, _ = scripted(
        lambda job: [[Failed(job.id, "gone")]], "POST", "/v1/embeddings", json={"input": "a"}
    )
    assert response.status_code == 503


def test_what_the_engine_refuses_is_400(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": "a", "dimensions": 99999})
    assert answer.status_code == 400 and "expected at most" in answer.json()["error"]["message"]
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": [[1], [10**6]]})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("prompt 1: ")
