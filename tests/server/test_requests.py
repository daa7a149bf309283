"""What a request may say: every field reaches the engine or is refused by name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from server.kit import Server, scripted

from pace.params import SamplingParams
from pace.server.app import ROUTES
from pace.server.protocol.chat import ChatRequest
from pace.server.protocol.common import IGNORED, Sampling
from pace.server.protocol.completions import CompletionRequest
from pace.server.wire import Delta, Done, Event, Job

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def ok(job: Job) -> list[list[Event]]:
    n = job.params.get("n", 1)
    return [[*(Delta(job.id, i, "x", [1], finish_reason="stop") for i in range(n)), Done(job.id, 3, 0, n)]]


def job_of(path: str, body: dict[str, Any]) -> Job:
    response, backend = scripted(ok, "POST", path, json=body)
    assert response.status_code == 200, response.text
    (job,) = backend.jobs
    return job


def error_of(path: str, **request: Any) -> tuple[int, Any]:
    response, backend = scripted(ok, "POST", path, **request)
    assert not backend.jobs
    return response.status_code, response.json()["error"]


VALUES: dict[str, Any] = {
    "n": 2, "min_tokens": 1, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "presence_penalty": 1.0,
    "frequency_penalty": 1.0, "repetition_penalty": 1.5, "seed": 7, "stop": ["a"], "stop_token_ids": [1],
    "include_stop_str_in_output": True, "ignore_eos": True, "logit_bias": {"5": 1.0}, "bad_words": ["no"],
    "allowed_token_ids": [1, 2], "prompt_logprobs": 2, "skip_special_tokens": False,
    "spaces_between_special_tokens": True, "speculative": "off",
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_every_sampling_parameter_reaches_the_engine(name: str) -> None:
    for path, prompt in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)):
        params = job_of(path, prompt | {name: VALUES[name], "max_tokens": 9}).params
        assert params[name] == VALUES[name] and params["max_tokens"] == 9
        SamplingParams(**params)  # as the engine makes them


def test_no_field_is_forgotten() -> None:
    """A field of a request is a parameter of the engine, has a meaning of its own, or is listed as ignored."""
    own = {
        "model", "stream", "stream_options", "max_tokens", "structured_outputs", "response_format", "guided_json",
        "guided_regex", "guided_choice", "guided_grammar", "priority", "cache_salt", "request_id", "return_token_ids",
    }  # fmt: skip
    assert set(Sampling.__struct_fields__) == set(VALUES) | own | IGNORED
    settable = set(SamplingParams.__dataclass_fields__) - {"output_kind", "detokenize", "structured_outputs"}
    assert settable <= set(VALUES) | {"max_tokens", "logprobs"}


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_fields_change_nothing(name: str) -> None:
    value: Any = {"metadata": {"a": "b"}, "store": True}.get(name, "text")
    assert job_of("/v1/completions", {"prompt": "x", name: value}).params == {"max_tokens": 16}


def test_limits_of_output() -> None:
    assert job_of("/v1/completions", {"prompt": "x"}).params["max_tokens"] == 16
    assert job_of("/v1/chat/completions", CHAT).params["max_tokens"] is None  # to the context's end
    assert job_of("/v1/chat/completions", CHAT | {"max_completion_tokens": 5}).params["max_tokens"] == 5
    status, error = error_of(
        "/v1/chat/completions", json=CHAT | {"max_completion_tokens": 5, "max_tokens": 6}
    )
    assert status == 400 and error["param"] == "max_completion_tokens"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_in_every_form(prompt: Any, prompts: list[Any]) -> None:
    response, backend = scripted(ok, "POST", "/v1/completions", json={"prompt": prompt, "n": 2})
    assert [job.prompt for job in backend.jobs] == prompts
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(2 * len(prompts)))
    assert response.json()["usage"]["completion_tokens"] == 2 * len(prompts)


@pytest.mark.parametrize("prompt", [[], ["a", 1], [["a"]], 5, None, [None], ["a"] * 65, [[]] * 65])
def test_prompts_in_no_form_are_refused(prompt: Any) -> None:
    status, error = error_of("/v1/completions", json={"prompt": prompt})
    assert status == 400 and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unknown_fields_are_named(path: str) -> None:
    for field in ("temprature", "functions", "echo" if "chat" in path else "messages"):
        status, error = error_of(
            path, json={"prompt": "x", field: 1} if "chat" not in path else CHAT | {field: 1}
        )
        assert status == 400 and error["param"] == field and f"`{field}`" in error["message"]
        assert error["code"] == "unknown_field"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "x", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"n": 1000}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
    ],
)
def test_what_contradicts_itself_is_named(body: dict[str, Any], param: str) -> None:
    status, error = error_of("/v1/chat/completions", json=CHAT | body)
    assert status == 400 and error["param"] == param, error


BAD_JSON = {
    "empty": b"",
    "truncated": b'{"messages": [',
    "nan": b'{"messages": [], "temperature": NaN}',
    "infinite": b'{"messages": [], "temperature": 1e999}',
    "surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "utf8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "list": b"[]",
    "null": b"null",
    "text": b"hello",
    "trailing": b'{"messages": []} x',
}


@pytest.mark.parametrize("path", sorted(entry.path for entry in ROUTES if entry.body is not None))
@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_400(name: str, path: str) -> None:
    status, error = error_of(path, content=BAD_JSON[name])
    assert status == 400 and len(error["message"]) < 1000
    assert error["type"] == "invalid_request_error"  # Anthropic's name and OpenAI's


def with_integer(value: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests with this integer in every place that may hold one."""
    short: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
    chat = CHAT | {"max_tokens": 1}
    schema = {"type": "object", "properties": {"a": {"maximum": value}}}
    function = {"name": "f", "parameters": schema}
    own = ("priority", "seed", "n", "top_k", "min_tokens", "logprobs", "prompt_logprobs", "speculative")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [value]}}}
    return [
        *(("/v1/completions", short | {name: value}) for name in (*own, "max_tokens")),
        *(
            ("/v1/completions", short | {name: [value]})
            for name in ("stop_token_ids", "allowed_token_ids", "prompt")
        ),
        ("/v1/completions", short | {"logit_bias": {str(value): 1}}),
        ("/v1/chat/completions", chat | {"chat_template_kwargs": {"a": value}}),
        ("/v1/chat/completions", chat | {"response_format": form}),
        ("/v1/chat/completions", chat | {"tools": [{"type": "function", "function": function}]}),
        ("/v1/messages", chat | {"tools": [{"name": "f", "input_schema": schema}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", **function}]}),
        ("/tokenize", CHAT | {"chat_template_kwargs": {"a": value}}),
        ("/detokenize", {"tokens": [value]}),
        ("/v1/embeddings", {"input": [value]}),
    ]


@pytest.mark.parametrize("value", [10**400, 1 << 64, -(1 << 63) - 1], ids=["10^400", "2^64", "-2^63-1"])
def test_huge_integers_are_400_wherever_they_stand(server: Server, value: int) -> None:
    """Nothing between here and the engine has room for them: no field lets one through to where it breaks something."""
    with httpx.Client(base_url=server.url) as http:
        for path, body in with_integer(value):
            answer = http.post(path, content=json.dumps(body))
            assert answer.status_code == 400, (path, list(body)[-1], answer.text)
        assert http.get("/health").status_code == 200


def test_of_keys_that_come_twice_the_last_one_counts() -> None:
    """As Python, JavaScript and Go read them; what a proxy in front has checked is what is meant."""
    for first, last in (("a", "b"), ("b", "a")):
        body = f'{{"prompt": "{first}", "max_tokens": 1, "prompt": "{last}", "max_tokens": 2}}'
        response, backend = scripted(ok, "POST", "/v1/completions", content=body.encode())
        assert response.status_code == 200
        assert backend.jobs[0].prompt == last and backend.jobs[0].params["max_tokens"] == 2


def test_tools_reach_the_template_unless_the_choice_is_none() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    job = job_of("/v1/chat/completions", CHAT | {"tools": tools})
    assert job.chat is not None and job.chat.tools == tools
    job = job_of("/v1/chat/completions", CHAT | {"tools": tools, "tool_choice": "none"})
    assert job.chat is not None and job.chat.tools is None


def test_a_body_over_the_limit_is_413() -> None:
    from pace.server.service import Limits

    response, _ = scripted(
        ok, "POST", "/v1/completions", Limits(max_body_bytes=64), json={"prompt": "x" * 64}
    )
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_scoring_alone_draws_nothing_that_is_told() -> None:
    response, backend = scripted(
        ok, "POST", "/v1/completions", json={"prompt": "x", "echo": True, "max_tokens": 0}
    )
    assert backend.jobs[0].params["max_tokens"] == 1
    assert response.json()["choices"][0]["text"] == "" and response.json()["usage"]["completion_tokens"] == 0
    assert error_of("/v1/completions", json={"prompt": "x", "max_tokens": 0})[1]["param"] == "max_tokens"


def test_types_are_strict() -> None:
    for kind in (ChatRequest, CompletionRequest):
        assert kind.__struct_config__.forbid_unknown_fields
