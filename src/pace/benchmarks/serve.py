"""Load on a server of OpenAI's API, as its users make it: open loop, times as clients see them; vLLM's names."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pace.benchmarks.dataset import BenchRequest, Shape
from pace.benchmarks.http_client import Client
from pace.console import progress_bar
from pace.errors import PaceError

__all__ = ["Load", "Outcome", "run"]

_WORDS = [
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they", "at",
    "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all", "were", "when", "we", "there",
    "can", "an", "your", "which", "their", "said", "if", "do", "will", "each", "about", "how", "up", "out", "them",
    "then", "she", "many", "some", "so", "these", "would", "other", "into", "has", "more", "her", "two", "like", "him",
    "see", "time", "could", "no", "make", "than", "first", "been", "its", "who", "now", "people", "my", "made", "over",
    "did", "down",
]  # fmt: skip
"""What prompts are made of: words that nearly every vocabulary has as one token."""

CALIBRATION = 200  # words of the request that tells how many tokens they are


@dataclass(frozen=True)
class Load:
    """What a run asks of a server.

    Attributes:
        base_url: of the server; a path in it stands before every path.
        model: its name there; None: the first that /v1/models has.
        is_chat: ask /v1/chat/completions; otherwise /v1/completions.
        api_key: sent as bearer.
        max_concurrency: requests that are open at a time; None: any number, as an open loop has it.
        ignore_eos: ask for outputs of full length, which OpenAI's own API can't.
        timeout_s: until a request is given up.
        extra_body: fields of every request.
    """

    base_url: str
    model: str | None = None
    is_chat: bool = False
    api_key: str | None = None
    max_concurrency: int | None = None
    ignore_eos: bool = True
    timeout_s: float = 600.0
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of one request; times in seconds.

    Attributes:
        start_s: when it was sent, since the start of the run.
        status: of HTTP; 0: there was no answer.
        error: "" where it has succeeded.
        end_s: from its start to its end.
        ttft_s: to its first token.
        itls_s: between chunks with tokens.
        n_input, n_output: tokens, as the server counts them, else as they were asked for.
        text: of the output.
    """

    start_s: float = 0.0
    status: int = 0
    error: str = ""
    end_s: float = 0.0
    ttft_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    n_input: int = 0
    n_output: int = 0
    text: str = ""

    @property
    def ok(self) -> bool:
        """Whether it has succeeded."""
        return not self.error

    @property
    def tpot_s(self) -> float | None:
        """Time of a token after the first; None where there is no second."""
        return None if self.n_output < 2 else (self.end_s - self.ttft_s) / (self.n_output - 1)


class _Runner:
    """Sends requests to one server."""

    def __init__(self, load: Load, model: str, client: Client) -> None:
        self._load = load
        self._model = model
        self._client = client

    def body(self, request: BenchRequest) -> bytes:
        """A request's JSON."""
        body: dict[str, Any] = {
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
            "max_tokens": request.output_len,
        }
        if self._load.is_chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if self._load.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body | self._load.extra_body).encode()

    async def send(self, request: BenchRequest, zero_s: float) -> Outcome:
        """Send one request and read its stream; what goes wrong is in the outcome."""
        outcome = Outcome(n_input=len(request.prompt), n_output=request.output_len)
        body = self.body(request)
        start_s = time.perf_counter()
        outcome.start_s = start_s - zero_s
        try:
            await asyncio.wait_for(self._read(body, outcome, start_s), self._load.timeout_s)
        except asyncio.TimeoutError:
            outcome.error = f"no end within {self._load.timeout_s:g} s"
        except (PaceError, ValueError) as error:
            outcome.error = str(error) or type(error).__name__
        outcome.end_s = time.perf_counter() - start_s
        return outcome

    async def _read(self, body: bytes, outcome: Outcome, start_s: float) -> None:
        path = "/v1/chat/completions" if self._load.is_chat else "/v1/completions"
        texts: list[str] = []
        last_s = 0.0
        async with self._client.request("POST", path, body) as answer:
            outcome.status = answer.status
            if answer.status != 200:
                outcome.error = (
                    f"HTTP {answer.status}: {(await answer.body())[:300].decode('utf-8', 'replace')}"
                )
                return
            async for now_s, data in answer.events():
                if data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    outcome.error = str(chunk["error"])[:300]
                usage = chunk.get("usage")
                if usage:
                    outcome.n_input, outcome.n_output = usage["prompt_tokens"], usage["completion_tokens"]
                text = _new_text(chunk)
                if text is None:
                    continue
                texts.append(text)
                if last_s:
                    outcome.itls_s.append(now_s - last_s)
                else:
                    outcome.ttft_s = now_s - start_s
                last_s = now_s
        outcome.text = "".join(texts)
        if not last_s and not outcome.error:
            outcome.error = "a stream without a token"


def _new_text(chunk: Mapping[str, Any]) -> str | None:
    """The text of a chunk that brings tokens; None: it brings none, as the first and the last ones of a chat."""
    choices = chunk.get("choices")
    if not choices:
        return None
    choice = choices[0]
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    text = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
    if text or delta.get("tool_calls"):
        return text
    return None if "role" in delta or choice.get("finish_reason") else ""


def words(shape: Shape, tokens_per_word: float, rng: np.random.Generator, prefix: Sequence[str]) -> str:
    """A prompt of about so many tokens; its prefix is the beginning of all."""
    n_prefix = round(shape.prefix_len / tokens_per_word)
    n_words = max(1, round(shape.input_len / tokens_per_word))
    return " ".join([*prefix[:n_prefix], *(_WORDS[i] for i in rng.integers(0, len(_WORDS), n_words))])


async def run(
    load: Load,
    requests: Sequence[BenchRequest] | Sequence[Shape],
    arrival_s: Sequence[float],
    *,
    seed: int = 0,
    show_progress: bool | None = None,
) -> tuple[str, list[Outcome], float]:
    """Send every request when its time has come, whatever has become of the others.

    Args:
        requests: texts, or lengths for which texts are made up.
        arrival_s: of each, since the start, ascending.

    Returns:
        The model's name, what became of each request, and seconds from the start to the last end.

    Raises:
        PaceError: the server does not answer the first request, which is not counted, as it should.
    """
    client = Client(load.base_url, load.api_key)
    try:
        model = load.model or await _first_model(client)
        runner = _Runner(load, model, client)
        ready = await _prepared(runner, requests, seed)
        limit = asyncio.Semaphore(load.max_concurrency or len(ready))
        bar = progress_bar(show_progress, total=len(ready), desc="requests", leave=False)
        zero_s = time.perf_counter()

        async def one(request: BenchRequest) -> Outcome:
            async with limit:
                outcome = await runner.send(request, zero_s)
            if bar is not None:
                bar.update()
            return outcome

        tasks = []
        for request, at_s in zip(ready, arrival_s, strict=True):
            delay_s = zero_s + at_s - time.perf_counter()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            tasks.append(asyncio.ensure_future(one(request)))
        outcomes = await asyncio.gather(*tasks)
        duration_s = time.perf_counter() - zero_s
        if bar is not None:
            bar.close()
        return model, outcomes, duration_s
    finally:
        client.close()


async def _first_model(client: Client) -> str:
    async with client.request("GET", "/v1/models") as answer:
        body = await answer.body()
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise PaceError(
            f"/v1/models answers {answer.status}: {body[:200]!r}, expected a list; name --model"
        ) from None


async def _prepared(
    runner: _Runner, requests: Sequence[BenchRequest] | Sequence[Shape], seed: int
) -> list[BenchRequest]:
    """The requests as texts, after a first one that warms up and tells how many tokens a word is."""
    rng = np.random.default_rng((seed, 4))
    text = words(Shape(0, CALIBRATION, 1), 1.0, rng, [])
    first = await runner.send(BenchRequest(text, 2), time.perf_counter())
    if not first.ok:
        raise PaceError(f"the first request failed: {first.error}")
    tokens_per_word = first.n_input / CALIBRATION if first.n_input != len(text) else 1.0
    prefix = [_WORDS[i] for i in rng.integers(0, len(_WORDS), 1 << 16)]
    return [
        request
        if isinstance(request, BenchRequest)
        else BenchRequest(words(request, tokens_per_word, rng, prefix), request.output_len)
        for request in requests
    ]
