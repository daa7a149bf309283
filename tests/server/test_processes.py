"""Engines that die or hang, and servers that are told to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from server.kit import Server, running

from pace.errors import PaceError
from pace.server import worker
from pace.server.wire import Event, Frames, Info, Order, Refused

LONG = {"prompt": "x", "max_tokens": 1900, "ignore_eos": True, "temperature": 0, "stream": True}
WITHIN_S = 1.0  # what a fault may take to be told
LOADED_S = 20.0  # what anything may take on a busy machine


def engines(server: Server) -> list[int]:
    """The processes of the engines."""
    pid = server.process.pid
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():  # whichever of its threads has started them
        found += [int(child) for child in (thread / "children").read_text().split()]
    return sorted(found)


class Stream:
    """A long completion that is read in the background."""

    def __init__(self, server: Server, **options: Any) -> None:
        self.events: list[Any] = []
        self.times: list[float] = []
        self.begun = threading.Event()
        self._url = f"{server.url}/v1/completions"
        self._options = LONG | options
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.begun.wait(LOADED_S)

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._options, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    self.times.append(time.monotonic())
                    data = line.removeprefix("data: ")
                    self.events.append(data if data == "[DONE]" else json.loads(data))
                    self.begun.set()

    def end(self) -> Any:
        """Wait for the last event."""
        self._thread.join(LOADED_S)
        assert not self._thread.is_alive()
        return self.events[-1]


def health(server: Server) -> int:
    return httpx.get(f"{server.url}/health").status_code


def wait_for(what: Any, within_s: float) -> float:
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < within_s, "it took too long"
        time.sleep(0.01)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    """A server with two engines."""
    with running("--data-parallel", "2") as server:
        wait_for(lambda: health(server) == 200, LOADED_S)
        yield server


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_dead_engine_is_told_within_a_second_and_replaced(pair: Server, number: int) -> None:
    wait_for(lambda: health(pair) == 200, LOADED_S)
    before = engines(pair)
    assert len(before) == 2
    streams = [Stream(pair, prompt=f"stream {i}") for i in range(2)]  # the idlest engine gets the second
    start = time.monotonic()
    os.kill(before[0], number)
    took = wait_for(lambda: health(pair) == 503, WITHIN_S)
    assert took < WITHIN_S
    other = httpx.post(f"{pair.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=LOADED_S)
    assert other.status_code == 200  # the other engine serves on
    lasts = [stream.end() for stream in streams]
    failed = [i for i, last in enumerate(lasts) if last != "[DONE]"]
    assert len(failed) == 1
    assert lasts[failed[0]]["error"]["code"] == "engine_failed"
    assert streams[failed[0]].times[-1] - start < WITHIN_S
    wait_for(lambda: health(pair) == 200, LOADED_S)
    after = engines(pair)
    assert len(after) == 2 and before[1] in after and before[0] not in after


def test_an_engine_that_cannot_go_on_ends_its_process() -> None:
    """Its thread has ended by a fault of ours: were the process to live on, all requests would fail, and /health be 200."""

    class Broken:
        def open(self, loop: object, tell: object) -> None: ...

        def info(self) -> Info:
            return Info(1, "broken", 512, {}, {})

        def check(self) -> None:
            raise PaceError("the engine has stopped")

    async def main() -> tuple[int, list[Any]]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            serving = worker._serve(Broken(), theirs, Frames(Order))  # type: ignore[arg-type]  # all it is asked
            code = await asyncio.wait_for(serving, LOADED_S)
            await asyncio.sleep(0)
            return code, Frames(Event).push(ours.recv(1 << 16))

    code, events = asyncio.run(main())
    assert code == 1
    assert isinstance(events[0], Info) and events[1:] == [Refused(0, "PaceError", "the engine has stopped")]


def test_two_engines_say_what_one_says(pair: Server, server: Server) -> None:
    body = {"prompt": [f"prompt {i}" for i in range(6)], "max_tokens": 12, "seed": 5, "temperature": 0.8}
    texts = [
        [
            c["text"]
            for c in httpx.post(f"{s.url}/v1/completions", json=body, timeout=LOADED_S).json()["choices"]
        ]
        for s in (pair, server)
    ]
    assert texts[0] == texts[1]


def test_sigterm_lets_streams_end() -> None:
    with running() as server:
        stream = Stream(server, max_tokens=400)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503, WITHIN_S)
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "shutting_down"
        assert stream.end() == "[DONE]"  # what runs may end
        assert server.process.wait(LOADED_S) == 0


def test_logs_on_a_full_disk_stop_nobody(tmp_path: Path) -> None:
    """stderr takes nothing any more: requests are answered, streams end, and so does the server, with exit code 0."""
    path = str(tmp_path / "socket")
    command = [sys.executable, "-m", "pace", "serve", "demo", "--uds", path]
    with Path("/dev/full").open("w") as full, httpx.Client(transport=httpx.HTTPTransport(uds=path)) as http:
        process = subprocess.Popen(command, stdout=full, stderr=full)
        try:

            def is_ready() -> bool:
                assert process.poll() is None
                with contextlib.suppress(httpx.TransportError):
                    return http.get("http://x/health/ready").status_code == 200
                return False

            wait_for(is_ready, LOADED_S)
            body = {"prompt": "x", "max_tokens": 5, "ignore_eos": True}
            for _ in range(3):
                answer = http.post("http://x/v1/completions", json=body)
                assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5
            assert http.post("http://x/v1/completions", content=b"{").status_code == 400
            with http.stream("POST", "http://x/v1/completions", json=body | {"stream": True}) as stream:
                assert list(stream.iter_lines())[-2] == "data: [DONE]"
            process.send_signal(signal.SIGTERM)
            assert process.wait(LOADED_S) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_sigterm_under_load_ends_in_time_and_tells_everybody() -> None:
    """Streams that run, requests that wait and ones that come later: each has an answer or an error, and nobody hangs."""
    with running("--shutdown-timeout", "1", "--max-num-seqs", "4") as server:
        streams = [Stream(server, max_tokens=50) for _ in range(4)]
        long = Stream(server, max_tokens=1900)
        url = f"{server.url}/v1/completions"
        with ThreadPoolExecutor(16) as pool:

            def ask(i: int) -> int:
                try:
                    return httpx.post(url, json=LONG | {"stream": False}, timeout=LOADED_S).status_code
                except httpx.TransportError:
                    return 0  # it listens no more

            asked = [pool.submit(ask, i) for i in range(16)]
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(LOADED_S) == 0
            assert time.monotonic() - start < 1 + 3 * WITHIN_S
            assert {answer.result() for answer in asked} <= {0, 200, 503}
        assert all(stream.end() == "[DONE]" or "error" in stream.end() for stream in [*streams, long])


def test_a_second_signal_aborts(pair: Server) -> None:
    """The last test of this server."""
    children = engines(pair)
    streams = [Stream(pair) for _ in range(4)]
    pair.process.send_signal(signal.SIGINT)
    wait_for(lambda: httpx.get(f"{pair.url}/health/ready").status_code == 503, WITHIN_S)
    start = time.monotonic()
    pair.process.send_signal(signal.SIGINT)
    assert pair.process.wait(LOADED_S) == 1
    assert time.monotonic() - start < 2 * WITHIN_S
    assert all("error" in stream.end() for stream in streams)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_drain_ends_at_its_timeout() -> None:
    with running("--shutdown-timeout", "0.2") as server:
        streams = [Stream(server) for _ in range(4)]
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 0.2 + 2 * WITHIN_S
        assert all("error" in stream.end() for stream in streams)


@pytest.mark.slow
def test_engines_end_with_their_front_end() -> None:
    with running() as server:
        (child,) = engines(server)
        server.process.kill()
        wait_for(lambda: not Path(f"/proc/{child}").exists(), LOADED_S)


@pytest.mark.slow
def test_a_server_that_shall_exit_does_when_its_engine_dies() -> None:
    with running("--on-engine-death", "exit") as server:
        os.kill(engines(server)[0], signal.SIGKILL)
        assert server.process.wait(LOADED_S) not in (0, None)
        assert any("process has ended" in line for line in server.lines)


@pytest.mark.slow
def test_a_server_that_was_stopped_goes_on() -> None:
    """After Ctrl-Z and fg: the engine did not hang, though nobody has heard of it for longer than it may be silent."""
    with running("--stall-timeout", "2") as server:
        before = engines(server)
        stream = Stream(server)
        for _ in range(3):
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            server.process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
        assert stream.end() == "[DONE]"
        assert engines(server) == before and health(server) == 200


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    server = Server("--max-model-len", "100000000")
    try:
        assert server.process.wait(LOADED_S) == 2
        assert any("max_model_len" in line for line in server.lines), server.lines
    finally:
        server.kill()


def test_a_port_in_use_is_told_before_anything_is_loaded(server: Server) -> None:
    other = Server(port=httpx.URL(server.url).port or 0)
    try:
        assert other.process.wait(LOADED_S) == 2
        assert any("can't listen" in line for line in other.lines)
    finally:
        other.kill()


def test_a_public_address_without_keys_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    from pace.config import EngineConfig
    from pace.server.serve import ServeOptions, warn_if_open

    def warning(**options: Any) -> str:
        warn_if_open(ServeOptions(EngineConfig("demo"), ("demo",), **options))
        return capsys.readouterr().err

    assert "everybody may ask" in warning(host="0.0.0.0")
    assert not warning() and not warning(host="0.0.0.0", api_keys=("k",)) and not warning(uds="/tmp/x")
