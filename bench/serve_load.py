"""`pace serve demo` under load, on this machine: `python bench/serve_load.py [--seconds 20]`.

Streams at once against the same alone; an open loop below and above capacity; readers that hardly read. The client runs in
this process, on the same cores as the server, so that figures are of all three together: front-end, engine, client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

from pace.benchmarks.dataset import BenchRequest, Shape
from pace.benchmarks.serve import Load, Outcome, run
from pace.benchmarks.serve_figures import summary
from pace.benchmarks.traces import arrivals, shapes_of
from pace.config import PLACES

N_STREAMS, N_SLOW = 256, 50
N_SEQS, N_WAITING = PLACES, 64


class Server:
    """The server, for the length of a with block."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "pace", "serve", "demo", "--port", "0", "--no-access-log", *options]
        self.process = subprocess.Popen(
            [*command, "--threads", "1"],
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Server:
        assert self.process.stderr is not None
        lines = iter(self.process.stderr)
        self.url = next(found[1] for line in lines if (found := re.search(r" at (\S+)\]", line)))
        threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def load(self) -> int:
        """Prompts whose outputs are being made."""
        with urllib.request.urlopen(f"{self.url}/load") as answer:
            return int(json.load(answer)["server_load"])

    def memory_mb(self) -> float:
        """Memory of front-end and engine, without pages of files."""
        pid = self.process.pid
        child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        texts = [Path(f"/proc/{number}/status").read_text() for number in (pid, child)]
        return sum(int(re.findall(r"RssAnon:\s+(\d+)", text)[0]) for text in texts) / 1024


def send(
    server: Server, requests: Any, times: list[float], *, seed: int = 0, **options: Any
) -> tuple[list[Outcome], dict[str, Any]]:
    """Send requests; returns what became of each, and the figures."""
    _, outcomes, duration_s = asyncio.run(
        run(Load(server.url, "demo", **options), requests, times, seed=seed)
    )
    return outcomes, summary(outcomes, duration_s, percentiles=(50, 99))


def streams_at_once() -> None:
    """Each of many streams has the text that it has alone."""
    prompts = [BenchRequest(f"def f{i}(x, y={i}):\n    ", 40) for i in range(N_STREAMS)]
    options: Any = {"extra_body": {"temperature": 0.8, "seed": 7, "top_p": 0.95}, "ignore_eos": True}
    with Server("--max-num-waiting", str(2 * N_STREAMS)) as server:
        alone, _ = send(server, prompts, [0.0] * N_STREAMS, max_concurrency=1, **options)
        together, figures = send(server, prompts, [0.0] * N_STREAMS, **options)
    wrong = sum(a.text != b.text or not b.ok for a, b in zip(alone, together, strict=True))
    print(f"{figures['max_concurrent_requests']} streams at once: {wrong} differ from what they are alone")


def open_loop(seconds: float) -> None:
    """Poisson arrivals below and above what the server can do."""
    with Server("--max-num-waiting", str(N_WAITING)) as server:
        n_open = N_SEQS + N_WAITING // 2
        rates = []
        # Prompts of their own each time: the same ones again are in the cache, and 298 come out for 243.
        for seed in (1, 2, 3):
            shapes = shapes_of("random", 1000, input_len=64, output_len=32, range_ratio=0.5, seed=seed)
            figures = send(server, shapes, [0.0] * len(shapes), max_concurrency=n_open)[1]
            rates.append(figures["request_throughput"])
        capacity = max(rates)
        print(
            f"capacity, {n_open} open at a time: {capacity:.1f} requests/s, best of {sorted(map(round, rates))}"
        )
        for share in (0.5, 0.8, 1.0, 1.5):
            n = max(50, int(capacity * share * seconds))
            shapes = shapes_of("random", n, input_len=64, output_len=32, range_ratio=0.5, seed=n)
            before = server.memory_mb()
            _, figures = send(server, shapes, arrivals(n, capacity * share, seed=n).tolist())
            line = f"{share:.1f} x capacity, {n} requests: {figures['completed']} done, {figures['rejected']} rejected, "
            line += f"{figures['failed'] - figures['rejected']} failed, {figures['request_throughput']:.1f} done/s "
            line += f"({figures['request_throughput'] / capacity:.2f}); time to first token "
            line += f"p50 {figures['p50_ttft_ms']:.0f} p99 {figures['p99_ttft_ms']:.0f} ms"
            if figures["rejected"]:
                line += f"; 429 after p50 {figures['p50_rejection_ms']:.0f} p99 {figures['p99_rejection_ms']:.0f} ms"
            print(f"{line}; memory {before:.0f} -> {server.memory_mb():.0f} MB")


def read_slowly(url: str, n: int, stop: threading.Event, bytes_per_s: int) -> None:
    """Streams whose readers take a byte at a time; with many bytes a second they keep up."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(
        {"prompt": "import", "max_tokens": 300, "stream": True, "ignore_eos": True, "n": 1}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    links = []
    for _ in range(n):
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect((host, int(port)))
        link.sendall(head + body)
        links.append(link)
    while not stop.wait(1.0 if bytes_per_s == 1 else 0.05):
        for link in links:
            link.recv(bytes_per_s)
    for link in links:
        link.close()


def slow_readers() -> None:
    """Readers that take a byte a second beside others."""
    shapes = [Shape(0, 32, 100)] * 150
    results: dict[str, list[dict[str, Any]]] = {}
    with Server("--max-num-waiting", "512", "--slow-client-timeout", "600") as server:
        for seed, name in enumerate(("alone", "beside slow ones") * 3):
            # Prompts of their own each time: the same ones would be found in the prefix cache by readers alone, while
            # slow ones' outputs drive them out of it.
            stop = threading.Event()
            reading = threading.Thread(target=read_slowly, args=(server.url, N_SLOW, stop, 1))
            if name != "alone":
                reading.start()
                time.sleep(1.0)
                while server.load():  # until their outputs have been made; then they are unread
                    time.sleep(0.2)
            _, figures = send(server, shapes, [0.0] * len(shapes), max_concurrency=N_SLOW, seed=seed)
            stop.set()
            if name != "alone":
                reading.join()
            results.setdefault(name, []).append(figures)
    for name, runs in results.items():
        itl, ttft = (median(one[f"p99_{key}_ms"] for one in runs) for key in ("itl", "ttft"))
        line = f"{N_SLOW} readers {name}, medians of three: time between chunks p99 {itl:.1f} ms, "
        print(f"{line}first token p99 {ttft:.0f} ms")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each open loop")
    parser.add_argument("--only", choices=("streams", "open", "slow"))
    args = parser.parse_args()
    if args.only in (None, "streams"):
        streams_at_once()
    if args.only in (None, "open"):
        open_loop(args.seconds)
    if args.only in (None, "slow"):
        slow_readers()


if __name__ == "__main__":
    main()
