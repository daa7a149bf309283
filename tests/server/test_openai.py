"""The official client against `pace serve demo`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from server.kit import Server

from pace.llm import LLM
from pace.params import SamplingParams

PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", threads=1) as llm:
        yield llm


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion_is_what_the_library_says(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    (want,) = llm.generate(PROMPT, params)
    got = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=20)
    assert got.choices[0].text == want.outputs[0].text
    assert got.choices[0].finish_reason == want.outputs[0].finish_reason
    assert got.usage is not None and got.usage.prompt_tokens == len(want.prompt_token_ids)
    stream = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == want.outputs[0].text


def test_chat_is_what_the_library_says(client: openai.OpenAI, llm: LLM) -> None:
    messages = [{"role": "user", "content": "Write a loop."}]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=30)
    (want,) = llm.chat([messages], params)
    options: Any = {"model": "demo", "messages": messages, "temperature": 0.8, "seed": 3, "max_tokens": 30}
    got = client.chat.completions.create(**options)
    assert got.choices[0].message.content == want.outputs[0].text
    parts, usage = [], None
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        parts += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(parts) == want.outputs[0].text
    assert usage is not None and usage.completion_tokens == len(want.outputs[0].token_ids)


def test_stop_strings_never_show(client: openai.OpenAI, llm: LLM) -> None:
    (free,) = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=30))
    stop = free.outputs[0].text[10:13]
    options: Any = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop": stop}
    stream = client.completions.create(**options, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    text = "".join(chunk.text for chunk in chunks)
    assert text == free.outputs[0].text.partition(stop)[0]
    assert chunks[-1].finish_reason == "stop" and chunks[-1].stop_reason == stop


def test_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)
    (want,) = llm.generate(PROMPT, params)
    want_logprobs = want.outputs[0].logprobs or []
    got = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=4, logprobs=2)
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    chosen = [entries[i].logprob for i, entries in zip(want.outputs[0].token_ids, want_logprobs, strict=True)]
    assert logprobs.token_logprobs == chosen
    assert "".join(logprobs.tokens or []) == got.choices[0].text
    chat = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}], max_tokens=2, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and len(content) == 2 and all(len(entry.top_logprobs) == 3 for entry in content)


def test_scoring_as_lm_eval_asks_for_it(client: openai.OpenAI, llm: LLM) -> None:
    """Token ids in lists, echo, one token; the drawn token is among the top ones with the same float."""
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(PROMPT), tokenizer.encode("import os\nimport sys")]
    got = client.completions.create(
        model="demo", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    for choice, ids in zip(sorted(got.choices, key=lambda c: c.index), prompts, strict=True):
        (want,) = llm.generate({"prompt_token_ids": ids}, params)
        logprobs = choice.logprobs
        assert (
            logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
        )
        assert logprobs.token_logprobs[0] is None and len(logprobs.token_logprobs) == len(ids) + 1
        assert want.prompt_logprobs is not None
        scored = [
            e[i].logprob for i, e in zip(ids[1:], want.prompt_logprobs[1:], strict=True) if e is not None
        ]
        assert logprobs.token_logprobs[1:-1] == scored
        tops = zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True)
        assert all(own in top.values() for own, top in tops)  # the same float
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert choice.text.startswith(text) and logprobs.text_offset is not None
        assert logprobs.text_offset[-1] == len(text) and "".join(logprobs.tokens or []) == choice.text


def test_n_and_prompt_lists_stream_together(client: openai.OpenAI) -> None:
    options: Any = {
        "model": "demo",
        "prompt": ["a", "b"],
        "n": 2,
        "seed": 1,
        "max_tokens": 8,
        "temperature": 1,
    }
    whole = client.completions.create(**options)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [choice.text for choice in whole.choices] == [texts[i] for i in range(4)]


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"temperature": 999}, openai.BadRequestError, "temperature"),
        ({"prompt": [1, 999999]}, openai.BadRequestError, "prompt"),
        ({"prompt": ["fine", "x" * 300_000]}, openai.BadRequestError, "prompt"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, "foo"),
        ({"max_tokens": 10**30}, openai.BadRequestError, "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_byte(
    client: openai.OpenAI,
    body: dict[str, object],
    kind: type[openai.APIStatusError],
    param: str | None,
    stream: bool,
) -> None:
    with pytest.raises(kind) as raised:
        client.completions.create(**({"model": "demo", "prompt": "x", "stream": stream} | body))  # type: ignore[call-overload]  # a body of any kind
    assert raised.value.body is not None and raised.value.param == param


def test_many_streams_are_what_they_are_alone(server: Server) -> None:
    """256 at once from the asynchronous client; each equals its solo output."""

    async def main() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(i: int) -> str:
                stream = await client.completions.create(
                    model="demo",
                    prompt=f"x{i % 8} =",
                    seed=i % 8,
                    temperature=0.9,
                    max_tokens=24,
                    stream=True,
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            alone = [await one(i) for i in range(8)]
            return alone, await asyncio.gather(*(one(i) for i in range(256)))

    alone, together = asyncio.run(main())
    assert together == alone * 32


def test_health_and_version(server: Server) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/ping", "/version"):
        assert httpx.get(server.url + path).status_code == 200
    missing = httpx.get(server.url + "/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    assert httpx.get(server.url + "/v1/completions").status_code == 405
