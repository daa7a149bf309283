"""Clients that speak bad HTTP, slowly, too much or not to the end: each gets its answer, and the server lives."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server.kit import Server, running

BODY = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
HEAD_S = 1.0


def status_of(server: Server, data: bytes) -> int:
    """The status that raw bytes are answered with; 0: the connection was closed without one."""
    with server.connect() as connection:
        with contextlib.suppress(OSError):  # it is closed while we send
            connection.sendall(data)
        answer = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(1 << 16):
                answer += part
                if b"\r\n" in answer:
                    break
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


def post(*headers: str, body: bytes = BODY, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def length(n: int = len(BODY)) -> str:
    return f"content-length: {n}"


CASES: dict[str, tuple[bytes, set[int]]] = {
    "plain": (post(length()), {200}),
    "odd host": (post(length()).replace(b"host: x", b"host: x/health?a=b"), {200}),
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n", {400}),
    "a word": (b"hello\r\n\r\n", {400}),
    "bad method": (post(length()).replace(b"POST", b"P@ST"), {400}),
    "bad version": (post(length()).replace(b"HTTP/1.1", b"HTTP/9.9"), {400}),
    "two lengths": (post(length(), length(5)), {400}),
    "length and chunks": (post(length(), "transfer-encoding: chunked"), {400}),
    "length of letters": (post("content-length: x"), {400}),
    "negative length": (post("content-length: -1"), {400}),
    "huge length": (post("content-length: 99999999999999999999999999"), {400}),
    "announced too large": (post("content-length: 999999999"), {413}),
    "chunk overflow": (post("transfer-encoding: chunked", body=b"fffffffffffffffff\r\n"), {400, 0}),
    "chunks": (post("transfer-encoding: chunked", body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)), {200}),
    "bad chunk": (post("transfer-encoding: chunked", body=b"zz\r\nabc\r\n0\r\n\r\n"), {400, 0}),
    "200 headers": (post(*[f"x-{i}: y" for i in range(200)], length()), {400}),
    "header of 1 MB": (post("x: " + "y" * (1 << 20), length()), {431, 0}),
    "line of 1 MB": (b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nhost: x\r\n\r\n", {431, 0}),
    "zero in a header": (post("x: a\x00b", length()), {400}),
    "odd path": (post(length(), path="/v1/completions/../../etc/passwd"), {404}),
    "encoded path": (post(length(), path="/v1%2fcompletions%00"), {404}),
    "no path": (post(length(), path="*"), {400, 404}),
    "upgrade": (
        b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        {200, 400},
    ),
    "empty body": (post(length(0), body=b""), {400}),
}


@pytest.mark.parametrize("name", CASES)
def test_http(server: Server, name: str) -> None:
    data, expected = CASES[name]
    start = time.monotonic()
    assert status_of(server, data) in expected
    assert time.monotonic() - start < 5
    assert httpx.get(f"{server.url}/health").status_code == 200


def resident_kib(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.parametrize("kind", ["one header", "a million headers", "a line", "trailers"])
def test_a_head_of_200_mb_takes_no_memory(server: Server, kind: str) -> None:
    """uvicorn's own parser would keep all of it."""
    before = resident_kib(server)
    start, piece = {
        "one header": (b"GET /health HTTP/1.1\r\nhost: x\r\nx: ", b"y" * (1 << 20)),
        "a million headers": (b"GET /health HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n" * 200_000),
        "a line": (b"GET /", b"a" * (1 << 20)),
        "trailers": (post("transfer-encoding: chunked", body=b"0\r\n"), b"t: u\r\n" * 200_000),
    }[kind]
    with server.connect() as connection:
        connection.sendall(start)
        n_sent = 0
        with contextlib.suppress(OSError):  # it is closed while we send
            while n_sent < 200 << 20:
                connection.sendall(piece)
                n_sent += len(piece)
    assert n_sent < 200 << 20, "all of it was taken"
    assert resident_kib(server) - before < 32 << 10
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    """A server that waits a second for a head or a body and for slow clients."""
    seconds = str(HEAD_S)
    with running(
        "--head-timeout", seconds, "--body-timeout", seconds, "--slow-client-timeout", seconds
    ) as server:
        yield server


def n_fds(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_half_a_request_is_not_waited_for(impatient: Server) -> None:
    """Slow-loris: no head, half a head, a head without its body, a second head on a connection; 100 of each."""
    before = n_fds(impatient)
    beginnings = [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
        post(length()),
        post(length(9999))[:-5],
    ]
    beginnings[2] = beginnings[2][: -len(BODY) // 2]
    held = []
    try:
        for beginning in beginnings * 25:
            connection = impatient.connect()
            connection.sendall(beginning)
            held.append(connection)
        later = impatient.connect()
        later.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert later.recv(1 << 16).startswith(b"HTTP/1.1 200")
        later.sendall(b"GET /health HT")
        held.append(later)
        assert httpx.get(f"{impatient.url}/health").status_code == 200
        end = time.monotonic() + 6 * HEAD_S + 5
        while n_fds(impatient) > before + 3:
            assert time.monotonic() < end, "connections stay open"
            time.sleep(0.05)
    finally:
        for connection in held:
            connection.close()


def test_who_takes_nothing_is_let_go(impatient: Server) -> None:
    """A stream into a socket that nobody reads ends, and others do not notice."""
    body = json.dumps(
        {"prompt": ["x"] * 16, "max_tokens": 1500, "ignore_eos": True, "stream": True, "logprobs": 20}
    )
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = httpx.URL(impatient.url)
        connection.connect((url.host, url.port))
        connection.sendall(post(length(len(body)), body=body.encode()))
        end = time.monotonic() + 30
        load = -1
        while load != 0 or time.monotonic() < end - 29:
            assert time.monotonic() < end, "the stream runs on"
            load = httpx.get(f"{impatient.url}/load").json()["server_load"]
            time.sleep(0.05)
    assert httpx.get(f"{impatient.url}/health").status_code == 200


def leave(server: Server, n: int, seed: int) -> None:
    """n clients that leave at random times, gently or not."""
    rng = random.Random(seed)
    url = httpx.URL(server.url)
    for _ in range(n):
        connection = socket.create_connection((url.host, url.port), timeout=20)
        body = json.dumps(
            {
                "prompt": "word " * rng.choice([1, 50, 300]),
                "max_tokens": 1000,
                "ignore_eos": True,
                "stream": rng.random() < 0.7,
                "n": rng.choice([1, 2]),
            }
        ).encode()
        data = post(length(len(body)), body=body)
        connection.sendall(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        if rng.random() < 0.5:
            connection.settimeout(rng.choice([0.001, 0.01, 0.03]))
            with contextlib.suppress(OSError):
                connection.recv(rng.choice([1, 1 << 16]))
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def check_clean(server: Server, n_before: int) -> None:
    """Nothing of clients that left stays: no job, no block of the cache, no descriptor."""
    end = time.monotonic() + 20
    while True:
        stats = httpx.get(f"{server.url}/v1/server_metrics").json()["engines"][0]
        load = httpx.get(f"{server.url}/load").json()["server_load"]
        clean = (stats["n_requests"], stats["n_running"], stats["kv_usage"], load) == (0, 0, 0.0, 0)
        if clean and n_fds(server) <= n_before + 2:
            return
        assert time.monotonic() < end, (stats, load, n_fds(server), n_before)
        time.sleep(0.1)


def test_clients_that_leave_at_any_time_leave_nothing(server: Server) -> None:
    before = n_fds(server)
    leave(server, 200, seed=1)
    check_clean(server, before)


@pytest.mark.slow
def test_ten_thousand_clients_that_leave(server: Server) -> None:
    before = n_fds(server)
    for seed in range(100):
        leave(server, 100, seed)
    check_clean(server, before)
