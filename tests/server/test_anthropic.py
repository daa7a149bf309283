"""Anthropic's client, and its shapes from scripted events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from pydantic import TypeAdapter
from server.kit import Server, scripted

from pace.server.wire import Delta, Done, Event, Failed, Job, ToolCallDelta

QUESTION = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_the_client_reads_answers_and_streams(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "demo", "extra_body": {"temperature": 0}, **QUESTION}
    whole = claude.messages.create(**options, system="Be brief.")
    assert whole.content[0].type == "text" and whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 20
    with claude.messages.stream(**options, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text and last.stop_reason == "max_tokens"
    assert last.usage.output_tokens == 20
    counted = claude.messages.count_tokens(model="demo", messages=options["messages"], system="Be brief.")
    read = last.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == last.usage.input_tokens + read


def test_errors_have_its_shape(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.messages.create(model="demo", messages=[{"role": "user", "content": "x"}], max_tokens=0)
    assert raised.value.body["type"] == "error"  # type: ignore[index]  # it is there, or the test fails
    assert raised.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]  # it is there, or the test fails
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", messages=[{"role": "user", "content": "x"}], max_tokens=1)


def a_call(job: Job) -> list[list[Event]]:
    return [
        [Delta(job.id, 0, "", [1], reasoning="hm")],
        [Delta(job.id, 0, "Let me", [2])],
        [Delta(job.id, 0, "", [3], tool_calls=[ToolCallDelta(0, "call_1", "add", '{"a"')])],
        [Delta(job.id, 0, "", [4], tool_calls=[ToolCallDelta(0, "call_1", "add", ": 1}")])],
        [Delta(job.id, 0, "", [5], finish_reason="stop"), Done(job.id, 3, 1, 5)],
    ]


BLOCKS = [
    {"type": "thinking", "thinking": "hm", "signature": ""},
    {"type": "text", "text": "Let me"},
    {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
]


def test_blocks_as_a_whole() -> None:
    response, _ = scripted(a_call, "POST", "/v1/messages", json=QUESTION)
    assert response.json() == {
        "id": "msg_r",
        "model": "scripted",
        "content": BLOCKS,
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 2,
            "output_tokens": 5,
            "cache_read_input_tokens": 1,
            "cache_creation_input_tokens": 0,
        },
        "type": "message",
        "role": "assistant",
    }


def test_blocks_in_a_stream() -> None:
    response, _ = scripted(a_call, "POST", "/v1/messages", json=QUESTION | {"stream": True})
    events = []
    for part in response.text.strip().split("\n\n"):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    kinds = [event["type"].removeprefix("content_block_") for event in events]
    block = ["start", "delta", "stop"]
    assert kinds == [
        "message_start", *block, *block, "start", "delta", "delta", "stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert [e["index"] for e in events if "index" in e] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert deltas[0] == {"type": "thinking_delta", "thinking": "hm"}
    assert deltas[2] == {"type": "input_json_delta", "partial_json": '{"a"'}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 5


def test_a_failure_in_a_stream_is_an_event() -> None:
    def script(job: Job) -> list[list[Event]]:
        return [[Failed(job.id, "the engine is gone")]]

    response, _ = scripted(script, "POST", "/v1/messages", json=QUESTION | {"stream": True})
    last = response.text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\n") and "overloaded_error" in last


def test_conversations_reach_the_template_in_its_shape() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": BLOCKS},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "2"}]},
                {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    tools = [{"name": "add", "description": "adds", "input_schema": {"type": "object"}}]
    body = {
        "messages": messages, "max_tokens": 9, "system": [{"type": "text", "text": "Be brief."}], "tools": tools,
        "stop_sequences": ["X"], "top_k": 3, "thinking": {"type": "enabled", "budget_tokens": 1024},
    }  # fmt: skip
    response, backend = scripted(a_call, "POST", "/v1/messages", json=body)
    assert response.status_code == 200, response.text
    (job,) = backend.jobs
    assert job.params == {"max_tokens": 9, "stop": ["X"], "top_k": 3} and job.chat is not None
    function = {"name": "add", "arguments": {"a": 1}}
    assert job.chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "Let me",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "user", "content": "go on"},
    ]
    parameters = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
    assert job.chat.tools == [{"type": "function", "function": parameters}]
    assert job.chat.chat_template_kwargs == {"enable_thinking": True}


TOOLS = [{"name": "add", "input_schema": {"type": "object"}}]


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (None, "auto"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
        ({"type": "none"}, None),
    ],
)
def test_tool_choice_reaches_the_engine(choice: Any, told: Any) -> None:
    body = QUESTION | {"tools": TOOLS} | ({} if choice is None else {"tool_choice": choice})
    _, backend = scripted(a_call, "POST", "/v1/messages", json=body)
    chat = backend.jobs[0].chat
    assert chat is not None and chat.tool_choice == told and (chat.tools is None) == (told is None)


def test_one_tool_use_where_parallel_ones_are_disabled() -> None:
    def two(job: Job) -> list[list[Event]]:
        calls = [ToolCallDelta(i, f"call_{i}", "add", "{}") for i in range(2)]
        return [[Delta(job.id, 0, "", [1], tool_calls=calls, finish_reason="stop"), Done(job.id, 3, 0, 1)]]

    for disabled in (False, True):
        choice = {"type": "auto", "disable_parallel_tool_use": disabled}
        body = QUESTION | {"tools": TOOLS, "tool_choice": choice}
        response, _ = scripted(two, "POST", "/v1/messages", json=body)
        assert [block["id"] for block in response.json()["content"]] == ["call_0", "call_1"][: 2 - disabled]
        response, _ = scripted(two, "POST", "/v1/messages", json=body | {"stream": True})
        assert response.text.count("content_block_start") == 2 * (2 - disabled)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}], "tool_choice": {"type": "any"}},
        {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "tool_choice": {"type": "tool"}},
        {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "tool_choice": {"type": "all"}},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": "x"}], "thinking": {}},
        {"messages": [{"role": "user", "content": "x"}], "thinking": {"type": "on"}},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": "x"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "container": "c"},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "b", "type": "bash_20250124"}]},
    ],
)
def test_what_it_has_and_we_lack_is_refused(body: dict[str, Any]) -> None:
    response, backend = scripted(a_call, "POST", "/v1/messages", json={"max_tokens": 5} | body)
    assert response.status_code == 400 and not backend.jobs
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", ["The answer is", [{"type": "text", "text": "The answer is"}]])
def test_an_answer_goes_on_where_its_beginning_ends(content: Any) -> None:
    begun = {"role": "assistant", "content": content}
    asked = {"role": "user", "content": "x"}
    used = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
    for messages, is_begun in (
        ([asked, begun], True),
        ([asked, begun, asked], False),
        ([asked, used], False),
    ):
        _, backend = scripted(a_call, "POST", "/v1/messages", json={"messages": messages, "max_tokens": 5})
        chat = backend.jobs[0].chat
        assert chat is not None and chat.continue_final_message == is_begun
    streamed, _ = scripted(a_call, "POST", "/v1/messages", json=QUESTION | {"stream": True})
    types: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)
    for line in streamed.text.splitlines():
        if line.startswith("data: "):
            types.validate_python(json.loads(line[6:]))


def test_thinking_is_the_templates_where_it_is_adaptive() -> None:
    for kind, told in (
        ("adaptive", None),
        ("enabled", {"enable_thinking": True}),
        ("disabled", {"enable_thinking": False}),
    ):
        _, backend = scripted(a_call, "POST", "/v1/messages", json=QUESTION | {"thinking": {"type": kind}})
        chat = backend.jobs[0].chat
        assert chat is not None and chat.chat_template_kwargs == told
