"""Streams whose tokens come one by one, though steps accept several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server.kit import Server, running, scripted
from server.test_sse import frames

from pace.server.wire import Delta, Done, Event, Job

DRAFTS = {"method": "draft_model", "model": "demo", "num_speculative_tokens": 4, "adaptive": False}
ONE = {"stream_options": {"one_token_per_chunk": True, "include_usage": True}}
BODY = {"temperature": 0, "seed": 1, "max_tokens": 40, "stream": True, "return_token_ids": True}
PROMPT = {"prompt": "def fibonacci(n):\n"}
CHAT = {"messages": [{"role": "user", "content": "Write a loop."}]}


@pytest.fixture(scope="module")
def drafting() -> Iterator[Server]:
    """A server whose draft is the model itself: every step accepts all that was guessed."""
    options = ("--tool-call-parser", "hermes", "--threads", "1")
    with running(*options, "--speculative-config", json.dumps(DRAFTS)) as server:
        yield server


def chunks(server: Server, path: str, **body: Any) -> list[Any]:
    answer = httpx.post(f"{server.url}{path}", json=BODY | body, timeout=60)
    assert answer.status_code == 200, answer.text
    *rest, done = frames(answer.content)
    assert done == b"[DONE]"
    return rest


def told(parts: list[Any], index: int = 0) -> list[Any]:
    """The choices that bring tokens."""
    choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
    return [choice for choice in choices if choice.get("token_ids")]


def ids(choices: list[Any]) -> list[int]:
    return [token for choice in choices for token in choice["token_ids"]]


def text(choice: Any) -> str:
    return str(choice["text"] if "text" in choice else choice["delta"].get("content") or "")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", PROMPT),
        ("/v1/completions", PROMPT | {"logprobs": 2, "n": 2, "temperature": 0.7}),
        ("/v1/completions", PROMPT | {"echo": True, "logprobs": 0}),
        ("/v1/completions", PROMPT | {"stop": ["self", "if n"]}),
        ("/v1/completions", {"prompt": "s = 'äöü€", "ignore_eos": True}),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1}),
    ],
)
def test_each_token_has_a_chunk_and_all_say_the_same(
    drafting: Server, path: str, body: dict[str, Any]
) -> None:
    joined, split = chunks(drafting, path, **body), chunks(drafting, path, **body, **ONE)
    n_most = 0
    for index in range(body.get("n", 1)):
        many, ones = told(joined, index), told(split, index)
        n_most = max(n_most, *(len(choice["token_ids"]) for choice in many))
        assert {len(choice["token_ids"]) for choice in ones} == {1}
        assert "".join(map(text, ones)) == "".join(map(text, many))
        assert ids(ones) == ids(many)
        assert logprobs(ones) == logprobs(many)
        ends = [choice for part in split for choice in part["choices"] if choice["finish_reason"]]
        assert [choice["index"] for choice in ends].count(index) == 1
    assert n_most > 1
    assert split[-1]["usage"]["completion_tokens"] == sum(
        len(told(split, index)) for index in range(body.get("n", 1))
    )


def logprobs(choices: list[Any]) -> list[Any]:
    """Entries of all chunks, in their order."""
    entries: list[Any] = []
    for choice in choices:
        found = choice["logprobs"] or {}
        entries += found.get("content") or [*zip(*found.values(), strict=True)] if found else []
    return entries


def test_calls_come_piece_by_piece(drafting: Server) -> None:
    """A forced call's arguments, too; so many chunks that none brings more than its token."""
    parameters = {
        "type": "object",
        "properties": {"name": {"enum": ["a long enough city name"]}},
        "required": ["name"],
    }
    tools = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    body = CHAT | {"tools": tools, "tool_choice": "required"}

    def arguments(parts: list[Any]) -> list[str]:
        calls = [call for part in told(parts) for call in part["delta"].get("tool_calls") or ()]
        return [call["function"]["arguments"] for call in calls]

    many, ones = (
        chunks(drafting, "/v1/chat/completions", **body),
        chunks(drafting, "/v1/chat/completions", **body, **ONE),
    )
    assert json.loads("".join(arguments(ones))) == json.loads("".join(arguments(many)))
    assert len(arguments(ones)) > len(arguments(many))
    assert {len(choice["token_ids"]) for choice in told(ones)} == {1}


def test_reasoning_comes_piece_by_piece() -> None:
    """The answer goes on behind the opening tag, so all of it is reasoning."""
    options = (
        "--reasoning-parser",
        "deepseek_r1",
        "--threads",
        "1",
        "--speculative-config",
        json.dumps(DRAFTS),
    )
    messages = [*CHAT["messages"], {"role": "assistant", "content": "<think>"}]
    body = {
        "messages": messages,
        "continue_final_message": True,
        "add_generation_prompt": False,
        "ignore_eos": True,
    }
    with running(*options) as server:
        many, ones = (
            told(chunks(server, "/v1/chat/completions", **body)),
            told(chunks(server, "/v1/chat/completions", **body, **ONE)),
        )

    def reasoning(choices: list[Any]) -> str:
        return "".join(choice["delta"].get("reasoning_content") or "" for choice in choices)

    assert reasoning(ones) == reasoning(many) != "" == "".join(map(text, ones))
    assert ids(ones) == ids(many) and {len(choice["token_ids"]) for choice in ones} == {1}
    assert len(ones) > 2 * len(many)


def test_responses_take_the_option_and_no_other(drafting: Server) -> None:
    body = {"input": "Write a loop.", "temperature": 0, "max_output_tokens": 30, "stream": True}

    def deltas(**more: Any) -> list[str]:
        answer = httpx.post(f"{drafting.url}/v1/responses", json=body | more, timeout=60)
        events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
        return [event["delta"] for event in events if event["type"] == "response.output_text.delta"]

    many, ones = deltas(), deltas(stream_options={"one_token_per_chunk": True})
    assert "".join(ones) == "".join(many) and len(ones) > 2 * len(many)
    for wrong in ({"stream_options": {"include_usage": True}}, {"stream_options": {}, "stream": False}):
        answer = httpx.post(f"{drafting.url}/v1/responses", json=body | wrong)
        assert answer.status_code == 400 and "stream_options" in answer.json()["error"]["param"]


def test_who_reads_slowly_gets_them_one_by_one_too() -> None:
    def script(job: Job) -> list[list[Event]]:
        assert job.one_by_one
        together: list[Event] = [Delta(job.id, 0, f"{i}", [i]) for i in range(4)]
        return [[*together, Delta(job.id, 0, "", [9], finish_reason="stop"), Done(job.id, 3, 0, 5)]]

    body = PROMPT | BODY | ONE
    response, _ = scripted(script, "POST", "/v1/completions", json=body)
    parts = frames(response.content)
    assert [choice["token_ids"] for choice in told(parts[:-2])] == [[0], [1], [2], [3], [9]]


def test_bytes_of_tokens_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is what it would be, had its token been drawn alone."""
    monkeypatch.setattr("pace.server.endpoints.completions.time.time", lambda: 1700000000.5)
    steps: list[list[Event]] = [[Delta(1, 0, "a", [1])], [Delta(1, 0, "b", [2])]]

    def together(job: Job) -> list[list[Event]]:
        end: list[Event] = [Delta(job.id, 0, "c", [3], finish_reason="stop"), Done(job.id, 3, 0, 3)]
        return [[Delta(job.id, 0, "a", [1]), Delta(job.id, 0, "b", [2]), *end]]

    def alone(job: Job) -> list[list[Event]]:
        return [*steps, *([event] for event in together(job)[0][2:])]

    one = {"stream_options": {"one_token_per_chunk": True}}
    contents = [
        scripted(script, "POST", "/v1/completions", json=PROMPT | {"stream": True} | one)[0].content
        for script in (together, alone)
    ]
    assert contents[0] == contents[1] and contents[0].count(b"\n\n") == 4
