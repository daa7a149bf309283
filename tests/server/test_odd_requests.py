"""Requests that are odd in ways that other tests are not: each is answered rightly, or refused in words that help."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest
from server.kit import Server, scripted

from pace.server.wire import Delta, Done, Event, Job, Scores, TokenLogprob

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
TEXT = {"prompt": "x", "max_tokens": 8}


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


# ---- what only the engine can find out --------------------------------------------------------------------------

PROPERTIES = {f"p{i}": {"type": "integer"} for i in range(2000)}

IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "min_tokens": ({"allowed_token_ids": [5], "min_tokens": 3}, "no token is left"),
    "allowed": ({"allowed_token_ids": [500], "guided_choice": ["yes"]}, "no token is left"),
    "bad words": ({"guided_choice": ["yes"], "bad_words": ["yes", "y"]}, "no token is left"),
    "expression": ({"guided_regex": "a{1000}{1000}{1000}"}, "grammar can't go on"),
    "recursion": ({"guided_grammar": 'start: "a" start'}, "grammar can't go on"),
    "schema": ({"guided_json": {"type": "object", "properties": PROPERTIES}}, "grammar can't go on"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_a_request_itself_makes_impossible_is_400(server: Server, name: str) -> None:
    """5xx would have clients send it again and again."""
    fields, message = IMPOSSIBLE[name]
    answer = post(server, "/v1/completions", TEXT | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and message in error["message"]
    streamed = post(server, "/v1/completions", TEXT | fields | {"stream": True}).text
    assert message in streamed and "invalid_request_error" in streamed and "[DONE]" not in streamed


# ---- errors name what the request called it ----------------------------------------------------------------------

LONG = "word " * 5000

NAMED: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("/v1/completions", {"prompt": LONG}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": "x" * 100_000}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": ["x", LONG]}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": [[]]}, "prompt", None),
    ("/v1/completions", {"prompt": [1 << 20]}, "prompt", None),
    ("/v1/completions", TEXT | {"logit_bias": {"x": 1}}, "logit_bias", None),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages", "context_length_exceeded"),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    ("/v1/chat/completions", CHAT | {"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", None),
    ("/v1/chat/completions", CHAT | {"max_tokens": None, "min_tokens": 100_000}, "min_tokens", None),
    ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"range": 1}}, "chat_template_kwargs", None),
    ("/v1/embeddings", {"input": LONG}, "input", "context_length_exceeded"),
    ("/v1/embeddings", {"input": [[1], [1 << 20]]}, "input", None),
    ("/v1/responses", {"input": []}, "input", None),
    ("/v1/responses", {"input": LONG}, "input", "context_length_exceeded"),
    ("/v1/responses", {"input": "x", "max_output_tokens": 0}, "max_output_tokens", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "code"), NAMED)
def test_errors_name_the_field_of_the_request(
    server: Server, path: str, body: dict[str, Any], param: str, code: str | None
) -> None:
    answer = post(server, path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    if not error["message"].startswith(("the prompt", "prompt 1")):
        assert error["message"].startswith(param)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches"])
def test_every_error_below_messages_has_anthropics_shape(path: str) -> None:
    for method, body in (
        ("POST", b"{"),
        ("GET", b""),
        ("POST", b'{"messages": [], "max_tokens": 1, "model": "x"}'),
    ):
        response, _ = scripted(ok, method, path, content=body)
        assert response.status_code in (400, 404, 405)
        assert response.json()["type"] == "error" and set(response.json()["error"]) == {"type", "message"}
    response, _ = scripted(ok, "POST", "/v1/messages", json=CHAT | {"stop_sequences": [""]})
    assert response.json()["error"]["message"].startswith("stop_sequences has ''")


# ---- nothing is left out silently --------------------------------------------------------------------------------


def ok(job: Job) -> list[list[Event]]:
    token = TokenLogprob(7, -1.0, "h", b"h")
    return [
        [Scores(job.id, [None, [token]])],
        [Delta(job.id, 0, "x", [1], finish_reason="stop"), Done(job.id, 3, 0, 1)],
    ]


def test_a_streamed_chat_has_its_prompts_log_probabilities() -> None:
    response, _ = scripted(
        ok, "POST", "/v1/chat/completions", json=CHAT | {"stream": True, "prompt_logprobs": 1}
    )
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    told = [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk]
    assert told == [[None, {"7": {"logprob": -1.0, "decoded_token": "h"}}]]
    assert chunks[1]["choices"][0]["delta"]["content"] == "x"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": CHAT["messages"], "add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_tokenize_says_which_field_means_nothing(server: Server, body: dict[str, Any], param: str) -> None:
    answer = post(server, "/tokenize", body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_detokenize_has_a_limit(server: Server) -> None:
    answer = post(server, "/detokenize", {"tokens": [1] * 300_000})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tokens"


# ---- HTTP ----------------------------------------------------------------------------------------------------


def test_a_client_of_http_1_0_gets_its_stream_without_chunks(server: Server) -> None:
    body = json.dumps(TEXT | {"stream": True, "temperature": 0}).encode()
    with server.connect() as connection:
        head = f"POST /v1/completions HTTP/1.0\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head_got, _, rest = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head_got.lower()
    events = rest.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])


def test_a_compressed_body_is_named() -> None:
    response, backend = scripted(
        ok, "POST", "/v1/completions", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"}
    )
    assert response.status_code == 415 and "gzip" in response.json()["error"]["message"] and not backend.jobs


@pytest.mark.parametrize(
    "kind", ["text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", ""]
)
def test_a_web_page_must_send_what_needs_a_preflight(kind: str) -> None:
    """Any page that somebody looks at could make a server on his own machine work."""
    page = {"origin": "https://evil.example", "content-type": kind}
    content = json.dumps(TEXT).encode()
    response, backend = scripted(ok, "POST", "/v1/completions", content=content, headers=page)
    assert response.status_code == 415 and not backend.jobs
    response, backend = scripted(
        ok, "POST", "/v1/completions", content=content, headers={"content-type": kind}
    )
    assert response.status_code == 200  # curl's -d
    own = page | {"content-type": "application/json; charset=utf-8"}
    assert scripted(ok, "POST", "/v1/completions", content=content, headers=own)[0].status_code == 200


# ---- messages ------------------------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = {"role": "user", "content": "hi"}

WRONG_MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "no content": ({"role": "user"}, "messages[1].content is None"),
    "null": ({"role": "tool", "content": None}, "messages[1].content is None"),
    "a number": ({"role": "assistant", "content": 5}, "messages[1].content is 5"),
    "an object": ({"role": "user", "content": {"text": "x"}}, "messages[1].content is {"),
    "a part without a type": ({"role": "user", "content": [{"text": "x"}]}, "messages[1].content[0] is {"),
    "a number as part": ({"role": "user", "content": [5]}, "messages[1].content[0] is 5"),
    "another type": (
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        "messages[1].content[0] has type 'input_text'",
    ),
    "calls as text": ({"role": "assistant", "tool_calls": "f()"}, "messages[1].tool_calls is 'f()'"),
    "a call without a function": ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0] is {"),
    "a call without a name": (
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
        "messages[1].tool_calls[0] is {",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_MESSAGES)
def test_what_is_wrong_with_a_message_is_named(server: Server, name: str) -> None:
    """Not by what the template stumbles over."""
    message, said = WRONG_MESSAGES[name]
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = post(server, path, {"messages": [ASKED, message, ASKED]})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["message"].startswith(said) and error["param"] == "messages", error


def test_a_call_alone_is_a_message_that_older_templates_take(server: Server) -> None:
    """As OpenAI's own client sends it back: content null; the template adds it to a text."""
    for message in ({"content": None, "tool_calls": [CALL]}, {"tool_calls": [CALL]}, {"content": None}):
        answer = {"role": "assistant", **message}
        result = {"role": "tool", "tool_call_id": "1", "content": "5"}
        messages = [ASKED, answer, result]
        filled = [ASKED, answer | {"content": ""}, result]
        tokens = [
            post(server, "/tokenize", {"messages": some}).json()["tokens"] for some in (messages, filled)
        ]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
@pytest.mark.parametrize("given", ["a\nb", "../etc", "x" * 129, "\u202e"])
def test_ids_of_requests_in_the_body_are_as_those_in_the_header(path: str, given: str) -> None:
    body = CHAT if "chat" in path else {"input": "x"} if "emb" in path else TEXT
    response, backend = scripted(ok, "POST", path, json=body | {"request_id": given})
    assert (
        response.status_code == 400 and response.json()["error"]["param"] == "request_id" and not backend.jobs
    )


def test_a_function_has_a_name() -> None:
    tools = [{"type": "function", "function": {"name": ""}}]
    response, _ = scripted(ok, "POST", "/v1/chat/completions", json=CHAT | {"tools": tools})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tools"
