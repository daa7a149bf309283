"""Streams byte for byte, from scripted events."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from typing import Any

import httpx
import pytest
from server.kit import ScriptedBackend, scripted

from pace.server.app import make_app
from pace.server.backend import Call
from pace.server.service import FINGERPRINT, Service
from pace.server.sse import TextEvents, event
from pace.server.wire import Delta, Done, Event, Failed, Job, TokenLogprob, ToolCallDelta

MESSAGES = [{"role": "user", "content": "hi"}]


def two_words(job: Job) -> list[list[Event]]:
    return [
        [Delta(job.id, 0, "Hi", [5])],
        [Delta(job.id, 0, "", [6])],  # the first half of a character
        [Delta(job.id, 0, " é", [7], finish_reason="stop"), Done(job.id, 3, 2, 3)],
    ]


def frames(content: bytes) -> list[Any]:
    """The JSON of each event, of a stream that is made of nothing else."""
    parts = content.split(b"\n\n")
    assert parts.pop() == b"" and all(part.startswith(b"data: ") for part in parts)
    return [part[6:] if part == b"data: [DONE]" else json.loads(part[6:]) for part in parts]


def test_chat_byte_for_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace.server.endpoints.chat.time.time", lambda: 1700000000.5)
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    response, _ = scripted(two_words, "POST", "/v1/chat/completions", json=body)

    def chunk(choices: str, usage: str) -> str:
        return (
            'data: {"id":"chatcmpl-r","created":1700000000,"model":"scripted","choices":['
            f'{choices}],"object":"chat.completion.chunk","system_fingerprint":"{FINGERPRINT}","usage":{usage}}}\n\n'
        )

    def choice(delta: str, reason: str = "null") -> str:
        return f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}'

    usage = '{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":2}}'
    want = [
        chunk(choice('{"role":"assistant","content":""}'), "null"),
        chunk(choice('{"content":"Hi"}'), "null"),
        chunk(choice('{"content":""}'), "null"),
        chunk(choice('{"content":" é"}'), "null"),
        chunk(choice("{}", '"stop"'), "null"),
        chunk("", usage),
        "data: [DONE]\n\n",
    ]
    assert response.content.decode() == "".join(want)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "r"


def test_completion_byte_for_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace.server.endpoints.completions.time.time", lambda: 1700000000.5)
    response, _ = scripted(two_words, "POST", "/v1/completions", json={"prompt": "x", "stream": True})

    def chunk(text: str, reason: str = "null") -> str:
        return (
            'data: {"id":"cmpl-r","created":1700000000,"model":"scripted","choices":[{"index":0,'
            f'"text":"{text}","logprobs":null,"finish_reason":{reason},"stop_reason":null}}],'
            f'"object":"text_completion","system_fingerprint":"{FINGERPRINT}"}}\n\n'
        )

    want = chunk("Hi") + chunk("") + chunk(" é", '"stop"') + "data: [DONE]\n\n"
    assert response.content.decode() == want


def test_reasoning_and_tool_calls_stream_as_openai_streams_them() -> None:
    def script(job: Job) -> list[list[Event]]:
        call = ToolCallDelta(0, "call_1", "add", '{"a"')
        return [
            [Delta(job.id, 0, "", [1], reasoning="hm")],
            [Delta(job.id, 0, "", [2], tool_calls=[call])],
            [Delta(job.id, 0, "", [3], tool_calls=[ToolCallDelta(0, "call_1", "add", ": 1}")])],
            [Delta(job.id, 0, "", [4], finish_reason="stop"), Done(job.id, 3, 0, 4)],
        ]

    tools = [{"type": "function", "function": {"name": "add"}}]
    body = {"messages": MESSAGES, "tools": tools}
    response, _ = scripted(script, "POST", "/v1/chat/completions", json=body | {"stream": True})
    *chunks, done = frames(response.content)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert done == b"[DONE]"
    assert deltas[1:] == [
        {"reasoning_content": "hm"},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a"'},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {},
        {},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    whole, _ = scripted(script, "POST", "/v1/chat/completions", json=body)
    choice = whole.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"] == {
        "content": None,
        "role": "assistant",
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call_1", "function": {"name": "add", "arguments": '{"a": 1}'}, "type": "function"}
        ],
    }


def test_logprobs_of_a_chat_name_bytes_of_split_characters() -> None:
    def script(job: Job) -> list[list[Event]]:
        logprobs = [[TokenLogprob(6, -0.5, "", b"\xc3"), TokenLogprob(5, -0.25, "Hi", b"Hi")]]
        return [[Delta(job.id, 0, "", [6], logprobs=logprobs, finish_reason="length"), Done(job.id, 3, 0, 1)]]

    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
    response, _ = scripted(script, "POST", "/v1/chat/completions", json=body)
    assert response.json()["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "bytes:\\xc3",
                "logprob": -0.5,
                "bytes": [0xC3],
                "top_logprobs": [{"token": "Hi", "logprob": -0.25, "bytes": [72, 105]}],
            }
        ],
        "refusal": None,
    }


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_failure_in_a_stream_is_told_as_an_error_and_not_as_an_end(path: str) -> None:
    def script(job: Job) -> list[list[Event]]:
        return [[Delta(job.id, 0, "Hi", [5])], [Failed(job.id, "the engine is gone")]]

    body = {"messages": MESSAGES} if "chat" in path else {"prompt": "x"}
    response, _ = scripted(script, "POST", path, json=body | {"stream": True})
    last = frames(response.content)[-1]
    assert last == {
        "error": {
            "message": "the engine is gone",
            "type": "server_error",
            "param": None,
            "code": "engine_failed",
        }
    }
    whole, _ = scripted(script, "POST", path, json=body)
    assert whole.status_code == 503 and whole.json() == last


def test_a_slow_reader_gets_everything_and_less_often() -> None:
    def script(job: Job) -> list[list[Event]]:
        together: list[Event] = [Delta(job.id, 0, str(i), [i]) for i in range(9)]
        return [[*together, Delta(job.id, 0, "", [9], finish_reason="stop"), Done(job.id, 3, 0, 10)]]

    body = {"prompt": "x", "stream": True, "return_token_ids": True}
    response, _ = scripted(script, "POST", "/v1/completions", json=body)
    (chunk, _) = frames(response.content)
    assert chunk["choices"][0]["text"] == "012345678"
    assert chunk["choices"][0]["token_ids"] == list(range(10))


class SlowOutput:
    """A connection that is written to directly, and pauses after every piece."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.n_bytes = 0
        self.is_paused = False

    def begin(self) -> None:
        pass

    def end(self, data: bytes) -> bytes:
        return data

    def write(self, data: bytes) -> None:
        self.parts.append(data)
        self.is_paused = True

    async def drain(self) -> None:
        await asyncio.sleep(0.005)
        self.is_paused = False

    def abort(self) -> None:
        raise AssertionError("nobody was that slow")


@pytest.mark.parametrize("n", [1, 3])
def test_direct_writes_say_what_the_layers_say(n: int) -> None:
    """A slow connection of that kind, too: what it gets late is joined, and nothing is lost."""

    def script(job: Job) -> list[list[Event]]:
        steps: list[list[Event]] = [
            [Delta(job.id, i, f"{i}{step} ", [step]) for i in range(n)] for step in range(20)
        ]
        ends: list[Event] = [Delta(job.id, i, "", [99], finish_reason="stop") for i in range(n)]
        return [*steps, [*ends, Done(job.id, 3, 0, 21 * n)]]

    body = {"prompt": "x", "stream": True, "n": n, "return_token_ids": True}
    through, _ = scripted(script, "POST", "/v1/completions", json=body)

    async def direct() -> tuple[bytes, bytes]:
        output = SlowOutput()
        data = json.dumps(body).encode()
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "pace.output": output,
        }  # fmt: skip
        sent: list[Any] = []
        requests = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Any:
            return requests.pop() if requests else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        await make_app(Service(ScriptedBackend(script), ["scripted"]))(scope, receive, send)
        return b"".join(output.parts), sent[-1]["body"]

    written, farewell = asyncio.run(direct())
    assert farewell == b"data: [DONE]\n\n"
    for index in range(n):
        texts = []
        for content in (through.content, written + farewell):
            choices = [choice for frame in frames(content)[:-1] for choice in frame["choices"]]
            mine = [choice for choice in choices if choice["index"] == index]
            texts.append(("".join(c["text"] for c in mine), [i for c in mine for i in c["token_ids"]]))
            assert mine[-1]["finish_reason"] == "stop"
        assert texts[0] == texts[1]


@pytest.mark.parametrize("text", ["", "a", '"\\\n\x00', "é 😀\u2028", "\x00\x01\x00", "data: [DONE]\n\n"])
def test_events_from_halves_are_those_made_whole(text: str) -> None:
    mark = "\x00\x01\x00"

    def make(index: int, content: str) -> object:
        return {"id": f"chatcmpl-{mark}", "choices": [{"index": index, "text": content}], "last": mark + "x"}

    whole = TextEvents()
    assert [whole(make, i, text) for i in (0, 1, 0)] == [event(make(i, text)) for i in (0, 1, 0)]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_goes_without_the_garbage_collector(path: str, stream: bool) -> None:
    """What requests leave in cycles made a server's memory grow until the collector came by."""
    body: dict[str, Any] = {"prompt": "hi", "max_tokens": 3}
    if "chat" in path or "messages" in path:
        body = {"messages": MESSAGES, "max_tokens": 3}
    elif "responses" in path:
        body = {"input": "hi"}
    body |= {"stream": stream, "model": "scripted"}
    calls: list[weakref.ref[Call]] = []

    class Watched(ScriptedBackend):
        def submit(self, job: Job, call: Call) -> None:
            calls.append(weakref.ref(call))
            super().submit(job, call)

    async def main() -> None:
        transport = httpx.ASGITransport(make_app(Service(Watched(two_words), ["scripted"])))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        del response
        await asyncio.sleep(0.01)  # tasks that were cancelled end

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
        assert calls and all(call() is None for call in calls)
    finally:
        gc.enable()
