"""Load on a server: its times as a scripted server makes them, made-up traffic, and vLLM's names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pace.benchmarks.http_client import Client
from pace.benchmarks.serve import Load, Outcome, run
from pace.benchmarks.serve_figures import summary
from pace.benchmarks.traces import arrivals, shapes_of
from pace.cli import main
from pace.errors import PaceError, RequestError

Handler = Callable[[int, dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def serving(handler: Handler, use: Callable[[str], Awaitable[Any]]) -> Any:
    """What `use` makes of a server that `handler` answers for, request by request."""
    numbers = iter(range(10**6))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                n = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = await reader.readexactly(n)
                await handler(next(numbers), json.loads(body or b"{}"), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> Any:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        async with server:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    return asyncio.run(main())


async def stream(writer: asyncio.StreamWriter, *chunks: Any, gap_s: float = 0.0) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for chunk in chunks:
        await asyncio.sleep(gap_s)
        data = b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()) + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()
    writer.write(b"0\r\n\r\n")


def plain(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(data), data))


def text(part: str) -> dict[str, Any]:
    return {"choices": [{"text": part}]}


def usage(n_prompt: int, n_output: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_output}}


def test_times_and_tokens_are_those_of_the_stream() -> None:
    bodies = []

    async def handler(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if not body:
            plain(writer, 200, {"data": [{"id": "m"}]})
        elif number == 3:
            plain(writer, 429, {"error": "later"})
        elif number == 4:
            await stream(writer, text("a"), {"error": {"message": "broken"}})
        else:
            bodies.append(body)
            await stream(writer, text("a"), text("b"), text("c"), usage(400, 3), b"[DONE]", gap_s=0.02)

    async def use(url: str) -> Any:
        shapes = shapes_of("random", 3, input_len=100, output_len=3)
        return await run(Load(url, max_concurrency=1, extra_body={"top_k": 1}), shapes, [0.0, 0.0, 0.0])

    model, outcomes, duration_s = serving(handler, use)
    assert model == "m" and [one.status for one in outcomes] == [200, 429, 200]
    assert [one.error for one in outcomes] == ["", 'HTTP 429: {"error": "later"}', "{'message': 'broken'}"]
    (first, *_) = outcomes
    assert (first.n_input, first.n_output, first.text) == (400, 3, "abc")
    assert first.ttft_s >= 0.02 and len(first.itls_s) == 2 and min(first.itls_s) > 0.01
    assert first.ttft_s + sum(first.itls_s) <= first.end_s <= duration_s
    warm, asked = bodies
    assert asked["max_tokens"] == 3 and asked["ignore_eos"] and asked["top_k"] == 1 and asked["model"] == "m"
    assert (
        len(warm["prompt"].split()) == 200 and len(asked["prompt"].split()) == 50
    )  # 400 tokens were 200 words


def test_of_a_chat_only_chunks_with_tokens_count() -> None:
    async def handler(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        deltas: list[Any] = [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "a"},
            {"content": "b"},
        ]
        chunks: list[Any] = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        await stream(writer, *chunks, usage(1, 2), gap_s=0.01)

    async def use(url: str) -> Any:
        load = Load(url, "m", is_chat=True, ignore_eos=False)
        return await run(load, shapes_of("random", 1, input_len=1, output_len=3), [0.0])

    _, (outcome,), _ = serving(handler, use)
    assert outcome.text == "ab" and len(outcome.itls_s) == 1 and outcome.ttft_s >= 0.02 and outcome.ok


def test_the_loop_is_open() -> None:
    """A slow answer does not hold up who arrives next."""
    open_at_once = []

    async def handler(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        open_at_once.append(number)
        await stream(writer, text("a"), usage(1, 1), gap_s=0.1 if number else 0.0)

    async def use(url: str) -> Any:
        shapes = shapes_of("random", 5, input_len=1, output_len=1)
        return await run(Load(url, "m"), shapes, [0.0, 0.01, 0.02, 0.03, 0.04])

    _, outcomes, duration_s = serving(handler, use)
    assert duration_s < 0.45 and summary(outcomes, duration_s)["max_concurrent_requests"] == 5
    assert np.allclose([one.start_s for one in outcomes], [0.0, 0.01, 0.02, 0.03, 0.04], atol=0.05)


def test_an_idle_connection_that_the_server_has_closed_is_no_error() -> None:
    async def handler(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await stream(writer, text("a"), usage(1, 1))
        if number % 2 == 0:
            await writer.drain()
            writer.transport.abort()

    async def use(url: str) -> Any:
        shapes = shapes_of("random", 6, input_len=1, output_len=1)
        return await run(Load(url, "m", max_concurrency=1), shapes, [0.0] * 6)

    _, outcomes, _ = serving(handler, use)
    assert [one.error for one in outcomes] == [""] * 6


def test_an_unreachable_server_is_named() -> None:
    with pytest.raises(PaceError, match=r"127\.0\.0\.1:9: "):
        asyncio.run(run(Load("http://127.0.0.1:9"), [], []))
    with pytest.raises(RequestError, match="base URL is 'ftp://x'"):
        Client("ftp://x")


def test_figures_have_vllms_names_and_meanings() -> None:
    outcomes = [
        Outcome(0.0, 200, "", 1.0, 0.2, [0.4, 0.4], 10, 3, "abc"),
        Outcome(0.5, 200, "", 2.0, 1.0, [1.0], 20, 2, "ab"),
        Outcome(0.6, 429, "HTTP 429", 0.01),
        Outcome(3.0, 0, "gone", 0.5),
    ]
    result = summary(outcomes, 4.0, percentiles=(50, 99.9), goodput={"ttft": 500.0}, is_detailed=True)
    want = {
        "completed": 2, "failed": 2, "rejected": 1, "total_input_tokens": 30, "total_output_tokens": 5,
        "request_throughput": 0.5, "request_goodput": 0.25, "output_throughput": 1.25, "total_token_throughput": 8.75,
        "max_concurrent_requests": 3, "mean_ttft_ms": 600.0, "median_tpot_ms": 700.0, "mean_itl_ms": 600.0,
        "p50_e2el_ms": 1500.0, "p50_rejection_ms": 10.0, "errors": {"HTTP 429": 1, "gone": 1}, "output_lens": [3, 2, 0, 0],
    }  # fmt: skip
    assert {key: pytest.approx(result[key]) if key != "errors" else result[key] for key in want} == want
    assert "p99.9_ttft_ms" in result and "std_e2el_ms" in result


def test_arrivals_keep_their_rate_and_shape() -> None:
    times = arrivals(20000, 50.0, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all() and abs(gaps.mean() * 50 - 1) < 0.03
    assert abs(gaps.std() / gaps.mean() - 1) < 0.03  # Poisson: the gaps are exponential
    bursty = np.diff(arrivals(20000, 50.0, burstiness=0.3, seed=1))
    assert abs(bursty.std() / bursty.mean() - 0.3**-0.5) < 0.1
    together = arrivals(100, 50.0, burst_size=10)
    assert len(set(together.tolist())) == 10 and together[9] == together[0] < together[10]
    assert arrivals(3, float("inf")).tolist() == [0, 0, 0]
    for bad in ({"rate": 0.0}, {"rate": float("nan")}, {"rate": 1.0, "burstiness": 0.0}):
        with pytest.raises(RequestError):
            arrivals(3, **bad)  # type: ignore[arg-type]  # wrong on purpose


def test_traces_have_the_lengths_that_they_document() -> None:
    chats = shapes_of("sharegpt-like", 20000, input_len=0, output_len=0, seed=3)
    inputs, outputs = np.array([(one.input_len, one.output_len) for one in chats]).T
    assert abs(np.median(inputs) - 100) < 5 and abs(np.median(outputs) - 130) < 5
    assert inputs.max() == 2048 and outputs.max() == 1024 and inputs.min() == 4
    bursts = shapes_of("burstgpt-like", 20000, input_len=0, output_len=0, seed=3)
    short = np.mean([one.output_len < 30 for one in bursts])
    assert 0.23 < short < 0.28
    assert shapes_of("sharegpt-like", 5, input_len=0, output_len=0, scale=0.01)[0].input_len >= 1
    assert chats[:5] == shapes_of("sharegpt-like", 20000, input_len=0, output_len=0, seed=3)[:5]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--goodput", "itl:5"], "--goodput has 'itl:5'"),
        (["--metric-percentiles", "50,x"], "--metric-percentiles is '50,x'"),
        (["--request-rate", "0"], "the request rate is 0.0"),
        (["--dataset-name", "sharegpt-like", "--length-scale", "0"], "the length scale is 0.0"),
        (["--extra-body", "[]"], "--extra-body: holds []"),
    ],
)
def test_bad_options_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def handler(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if body:
            await stream(writer, text("a"), text("b"), usage(10, 2))
        else:
            plain(writer, 200, {"data": [{"id": "m"}]})

    file = tmp_path / "out.json"

    async def use(url: str) -> int:
        argv = [
            "bench",
            "serve",
            "--base-url",
            url,
            "--num-prompts",
            "4",
            "--json",
            "--result-filename",
            str(file),
        ]
        return await asyncio.to_thread(main, argv)

    assert serving(handler, use) == 0
    result = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["completed"] == 4 and result["model_id"] == "m" and result["request_rate"] == "inf"
