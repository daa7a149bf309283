"""What the official clients make of what the embedded model says seldom or never: calls, reasoning, schemas, failures."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest
from server.kit import Script, ScriptedBackend, Server

from pace.errors import QueueFullError
from pace.server.app import make_app
from pace.server.service import Service
from pace.server.wire import Delta, Done, Event, Failed, Job, TokenLogprob, ToolCallDelta

MESSAGES: Any = [{"role": "user", "content": "Add 1 and 2, and the weather."}]
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("add", "weather")
]


def with_client(kind: Any, backend: ScriptedBackend, run: Callable[[Any], Awaitable[Any]]) -> Any:
    """Run with an asynchronous client of an app whose engine is scripted."""

    async def main() -> Any:
        names = vars(sys.modules[kind.__mro__[1].__module__])
        http = names.get("httpx2") or names["httpx"]  # whichever this client uses
        transport = http.ASGITransport(make_app(Service(backend, ["scripted"])))
        path = "/v1" if kind is openai.AsyncOpenAI else ""
        async with kind(
            base_url=f"http://test{path}",
            api_key="none",
            max_retries=2,
            http_client=http.AsyncClient(transport=transport),
        ) as client:
            return await run(client)

    return asyncio.run(main())


def two_calls(job: Job) -> list[list[Event]]:
    return [
        [Delta(job.id, 0, "", [1], reasoning="Two things.")],
        [Delta(job.id, 0, "", [2], tool_calls=[ToolCallDelta(0, "call_1", "add", '{"a": ')])],
        [Delta(job.id, 0, "", [2], tool_calls=[ToolCallDelta(0, "call_1", "add", "1}")])],
        [Delta(job.id, 0, "", [3], tool_calls=[ToolCallDelta(1, "call_2", "weather", "{}")])],
        [Delta(job.id, 0, "", [4], finish_reason="stop"), Done(job.id, 3, 1, 5)],
    ]


def test_calls_that_the_openai_client_gathers_from_a_stream() -> None:
    async def run(client: openai.AsyncOpenAI) -> tuple[Any, Any]:
        options: Any = {"model": "scripted", "messages": MESSAGES, "tools": TOOLS}
        whole = await client.chat.completions.create(**options)
        async with client.chat.completions.stream(**options) as stream:
            async for _ in stream:
                pass
            return whole, await stream.get_final_completion()

    for answer in with_client(openai.AsyncOpenAI, ScriptedBackend(two_calls), run):
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls" and choice.message.reasoning_content == "Two things."
        calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [("call_1", "add", '{"a": 1}'), ("call_2", "weather", "{}")]


def test_calls_that_the_anthropic_client_gathers_from_a_stream() -> None:
    async def run(client: anthropic.AsyncAnthropic) -> Any:
        tools: Any = [{"name": name, "input_schema": {"type": "object"}} for name in ("add", "weather")]
        async with client.messages.stream(
            model="scripted", messages=MESSAGES, tools=tools, max_tokens=50
        ) as stream:
            return await stream.get_final_message()

    message = with_client(anthropic.AsyncAnthropic, ScriptedBackend(two_calls), run)
    assert [block.type for block in message.content] == ["thinking", "tool_use", "tool_use"]
    assert [block.input for block in message.content[1:]] == [{"a": 1}, {}]
    assert message.stop_reason == "tool_use"


def test_logprobs_in_a_stream() -> None:
    def script(job: Job) -> list[list[Event]]:
        top = [[TokenLogprob(5, -0.25, "Hi", b"Hi"), TokenLogprob(6, -2.0, "Ho", b"Ho")]]
        return [[Delta(job.id, 0, "Hi", [5], logprobs=top, finish_reason="stop"), Done(job.id, 3, 0, 1)]]

    async def run(client: openai.AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(
            model="scripted", messages=MESSAGES, logprobs=True, top_logprobs=2
        ) as stream:
            return await stream.get_final_completion()

    completion = with_client(openai.AsyncOpenAI, ScriptedBackend(script), run)
    (entry,) = completion.choices[0].logprobs.content
    assert (entry.token, entry.logprob, [top.token for top in entry.top_logprobs]) == (
        "Hi",
        -0.25,
        ["Hi", "Ho"],
    )


def failing(job: Job) -> list[list[Event]]:
    return [[Delta(job.id, 0, "half", [1])], [Failed(job.id, "the engine died")]]


def test_a_failure_in_a_stream_is_an_error_of_each_client() -> None:
    async def chat(client: openai.AsyncOpenAI) -> None:
        async for _ in await client.chat.completions.create(model="scripted", messages=MESSAGES, stream=True):
            pass

    async def messages(client: anthropic.AsyncAnthropic) -> None:
        async with client.messages.stream(model="scripted", messages=MESSAGES, max_tokens=5) as stream:
            await stream.get_final_message()

    with pytest.raises(openai.APIError, match="the engine died"):
        with_client(openai.AsyncOpenAI, ScriptedBackend(failing), chat)
    with pytest.raises(anthropic.APIError, match="the engine died"):
        with_client(anthropic.AsyncAnthropic, ScriptedBackend(failing), messages)


class FullAtFirst(ScriptedBackend):
    """Refuses so many jobs before it takes one."""

    def __init__(self, script: Script, n_refusals: int) -> None:
        super().__init__(script)
        self.n_refusals = n_refusals

    def submit(self, job: Job, call: Any) -> None:
        if self.n_refusals:
            self.n_refusals -= 1
            raise QueueFullError("the queue is full")
        super().submit(job, call)


@pytest.mark.parametrize("kind", [openai.AsyncOpenAI, anthropic.AsyncAnthropic])
def test_a_client_that_is_told_429_tries_again_after_what_it_was_told(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anyio

    waits: list[float] = []

    async def no_sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(anyio, "sleep", no_sleep)

    async def run(client: Any) -> Any:
        if kind is openai.AsyncOpenAI:
            return await client.chat.completions.create(model="scripted", messages=MESSAGES)
        return await client.messages.create(model="scripted", messages=MESSAGES, max_tokens=5)

    backend = FullAtFirst(two_calls, 2)
    assert with_client(kind, backend, run) and len(backend.jobs) == 1
    assert waits == [1.0, 1.0]  # retry-after
    refused = openai.RateLimitError if kind is openai.AsyncOpenAI else anthropic.RateLimitError
    with pytest.raises(refused):
        with_client(kind, FullAtFirst(two_calls, 3), run)


class Person(pydantic.BaseModel):
    """What the embedded model shall fill in."""

    name: Literal["Ada", "Grace"]
    born: int


def test_the_client_parses_what_a_schema_asked_for(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Who?"}]
    options: Any = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 200}
    completion = client.chat.completions.parse(**options, response_format=Person)
    person = completion.choices[0].message.parsed
    assert completion.choices[0].finish_reason == "length" or person is not None
    form: Any = {
        "type": "json_schema",
        "json_schema": {
            "name": "answer",
            "strict": True,
            "schema": {"type": "object", "properties": {"ok": {"enum": ["yes", "no"]}}, "required": ["ok"],
                       "additionalProperties": False},
        },
    }  # fmt: skip
    stream = client.chat.completions.create(**options, response_format=form, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text)["ok"] in ("yes", "no")


def test_the_asynchronous_client_says_what_the_synchronous_one_says(
    client: openai.OpenAI, server: Server
) -> None:
    options: Any = {"model": "demo", "prompt": "def f(", "temperature": 0, "max_tokens": 12}
    want = client.completions.create(**options).choices[0].text

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as other:
            assert [model.id async for model in other.models.list()] == ["demo"]
            assert (await other.completions.create(**options)).choices[0].text == want
            stream = await other.completions.create(**options, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == want
            response = await other.responses.create(model="demo", input="x", max_output_tokens=3)
            assert response.usage is not None and response.usage.output_tokens == 3

    asyncio.run(main())
