"""OpenAI's responses API, stateless."""

from __future__ import annotations

from typing import Any

import openai
import pytest
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
        {"input": 5},
    ],
)
def test_what_a_stateless_server_lacks_is_refused(body: dict[str, Any]) -> None:
    response, backend = scripted(a_call, "POST", "/v1/responses", json=body)
    assert response.status_code == 400 and not backend.jobs
