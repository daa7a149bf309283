"""OpenAI's responses API, stateless."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from server.kit import scripted

from pace.server.wire import Delta, Done, Event, Job, ToolCallDelta


def test_the_client_reads_answers_and_streams(client: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "input": "Write a loop.", "temperature": 0, "max_output_tokens": 20}
    whole = client.responses.create(**options, instructions="Be brief.")
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.usage is not None and whole.usage.output_tokens == 20 and whole.output_text
    events = list(client.responses.create(**options, instructions="Be brief.", stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    options["extra_body"] = {"stop": text[8:11]}
    with client.responses.stream(**options, instructions="Be brief.") as stream:
        assert stream.get_final_response().output_text == text.partition(text[8:11])[0]
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model="demo", input="x", previous_response_id="resp_1")
    assert raised.value.param == "previous_response_id"


def a_call(job: Job) -> list[list[Event]]:
    calls = [ToolCallDelta(0, "call_1", "add", '{"a": 1}'), ToolCallDelta(1, "call_2", "sub", "{}")]
    return [
        [Delta(job.id, 0, "", [1], reasoning="hm")],
        [Delta(job.id, 0, "Let me", [2])],
        [Delta(job.id, 0, "", [3], tool_calls=calls)],
        [Delta(job.id, 0, "", [4], finish_reason="stop"), Done(job.id, 3, 1, 4)],
    ]


def test_items() -> None:
    tools = [{"type": "function", "name": "add", "parameters": {"type": "object"}}]
    body = {"input": "x", "tools": tools, "reasoning": {"effort": "low"}}
    response, backend = scripted(a_call, "POST", "/v1/responses", json=body)
    output = response.json()["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[1]["content"][0]["text"] == "Let me"
    assert (output[2]["call_id"], output[2]["name"], output[2]["arguments"]) == ("call_1", "add", '{"a": 1}')
    chat = backend.jobs[0].chat
    assert chat is not None and chat.tools == [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    ]
    assert chat.chat_template_kwargs == {"reasoning_effort": "low"}
    streamed, _ = scripted(a_call, "POST", "/v1/responses", json=body | {"stream": True})
    kinds = [
        line.removeprefix("event: response.") for line in streamed.text.splitlines() if line[:5] == "event"
    ]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "reasoning_text.delta", "reasoning_text.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip


def test_inputs_reach_the_template_as_messages() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "add"}]},
        {"type": "reasoning", "id": "rs", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ]
    _, backend = scripted(a_call, "POST", "/v1/responses", json={"input": items})
    chat = backend.jobs[0].chat
    assert chat is not None
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "tool"]
    assert chat.messages[2]["tool_calls"][0]["id"] == "c" and chat.messages[3]["content"] == "2"


@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": "x", "tools": [{"type": "web_search"}]},
        {"input": "x", "truncation": "auto"},
        {"input": "x", "background": True},
        {"input": "x", "previous_response_id": "resp_1"},
        {"input": "x", "conversation": "conv_1"},
        {"input": "x", "prompt": {"id": "pmpt_1"}},
        {"input": "x", "top_logprobs": 3},
        {"input": "x", "include": ["message.output_text.logprobs"]},
        {"input": "x", "text": {"verbosity": "low"}},
        {"input": "x", "text": {"fromat": {"type": "text"}}},
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}},
        {"input": "x", "text": {"format": {"type": "xml"}}},
        {"input": "x", "reasoning": {"efort": "low"}},
        {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": 5}]},
        {"input": [{"type": "function_call", "call_id": "1", "arguments": "{}"}]},
        {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
        {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": {}}]},
        {"input": [{"type": "function_call_output", "output": "5"}]},
        {"input": [{"type": "function_call_output", "call_id": "1", "output": None}]},
        {"input": 5},
    ],
)
def test_what_a_stateless_server_lacks_is_refused(body: dict[str, Any]) -> None:
    response, backend = scripted(a_call, "POST", "/v1/responses", json=body)
    assert response.status_code == 400 and not backend.jobs
    error = response.json()["error"]
    (field,) = set(body) - {"input"} or {"input"}
    assert (
        error["param"].startswith(field)
        and field.split("[")[0] in error["message"]
        and "response_format" not in str(error)
    )


def test_what_asks_for_nothing_is_taken() -> None:
    nothing = {
        "previous_response_id": None, "conversation": None, "prompt": None, "background": False, "top_logprobs": 0,
        "max_tool_calls": 3, "include": ["reasoning.encrypted_content"], "text": {"verbosity": "medium"},
        "reasoning": {"summary": "auto"}, "prompt_cache_retention": "24h",
    }  # fmt: skip
    response, backend = scripted(a_call, "POST", "/v1/responses", json={"input": "x"} | nothing)
    assert response.status_code == 200 and backend.jobs, response.text


def test_what_the_limit_cuts_off_is_incomplete() -> None:
    def cut(job: Job) -> list[list[Event]]:
        thoughts = Delta(job.id, 0, "", [1], "hm")
        return [[thoughts, Delta(job.id, 0, "Let", [2], finish_reason="length"), Done(job.id, 3, 0, 2)]]

    response, _ = scripted(cut, "POST", "/v1/responses", json={"input": "x", "max_output_tokens": 2})
    assert [item["status"] for item in response.json()["output"]] == ["completed", "incomplete"]
    streamed, _ = scripted(
        cut, "POST", "/v1/responses", json={"input": "x", "max_output_tokens": 2, "stream": True}
    )
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    done = [event["item"]["status"] for event in events if event["type"] == "response.output_item.done"]
    assert done == ["completed", "incomplete"] and events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"] == response.json()["output"]
    types: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        types.validate_python(event)  # the client itself checks nothing
    Response.model_validate(response.json())
