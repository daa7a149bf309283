"""A mixed load on `pace serve demo` for a long time: does memory grow, do descriptors or threads leak?

    python bench/soak.py --minutes 30 --rate 3

Requests of every kind arrive as a Poisson process: streams that are read, streams that are left, whole answers, chats,
embeddings, JSON schemas, messages, responses, tokens, bad requests, /metrics. Every 10 seconds the memory, descriptors
and threads of front-end and engine are written down; at the end a line is fitted to each behind the first third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pace.benchmarks.http_client import Client
from pace.errors import PaceError

SAMPLE_S = 10.0
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WORDS = [
    "import",
    "def",
    "return",
    "class",
    "self",
    "for",
    "in",
    "range",
    "print",
    "None",
    "True",
    "while",
    "if",
    "else",
    "lambda",
    "yield",
    "with",
    "open",
    "as",
    "file",
]


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 60)))


def requests(rng: random.Random) -> tuple[str, str, dict[str, Any] | None, int]:
    """A request of a random kind: its name, path, body, and the status that it must have; 0: it is left midway."""
    chat = [{"role": "user", "content": text(rng)}]
    n = rng.randint(1, 60)
    kinds: list[tuple[str, str, dict[str, Any] | None, int]] = [
        ("stream", "/v1/completions", {"prompt": text(rng), "max_tokens": n, "stream": True}, 200),
        ("left", "/v1/completions", {"prompt": text(rng), "max_tokens": 400, "stream": True, "ignore_eos": True}, 0),
        ("whole", "/v1/completions", {"prompt": text(rng), "max_tokens": n, "n": rng.randint(1, 3), "logprobs": 2}, 200),
        ("chat", "/v1/chat/completions", {"messages": chat, "max_tokens": n, "stream": True}, 200),
        ("embed", "/v1/embeddings", {"input": [text(rng) for _ in range(rng.randint(1, 5))]}, 200),
        ("schema", "/v1/completions", {"prompt": "x", "max_tokens": 40, "guided_json": SCHEMA | {"title": str(n)}}, 200),
        ("messages", "/v1/messages", {"messages": chat, "max_tokens": n}, 200),
        ("responses", "/v1/responses", {"input": text(rng), "max_output_tokens": n, "stream": True}, 200),
        ("tokens", "/tokenize", {"prompt": text(rng)}, 200),
        ("bad", "/v1/completions", {"prompt": text(rng), "temperature": -1}, 400),
        ("too long", "/v1/completions", {"prompt": "x " * 20000}, 400),
        ("metrics", "/metrics", None, 200),
    ]  # fmt: skip
    return rng.choice(kinds)


async def send(client: Client, rng: random.Random, seen: Counter[str]) -> None:
    kind, path, body, expected = requests(rng)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        async with client.request("GET" if body is None else "POST", path, data) as answer:
            if expected == 0:
                async for _ in answer.pieces():
                    if rng.random() < 0.2:
                        raise asyncio.CancelledError
            elif answer.status != expected:
                seen[f"{kind}: {answer.status} {(await answer.body())[:200]!r}"] += 1
                return
            async for _ in answer.pieces():
                pass
    except asyncio.CancelledError:
        pass
    except PaceError as error:
        seen[f"{kind}: {error}"] += 1
        return
    seen[kind] += 1


def sample(pid: int) -> dict[str, float]:
    """Memory of its own in MB, descriptors and threads of a process; pages of files come and go as the kernel likes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "anon_mb": int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) / 1024,
        "fds": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
    }


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


async def soak(url: str, pid: int, minutes: float, rate: float, seed: int) -> None:
    client, rng, seen = Client(url), random.Random(seed), Counter[str]()
    engine, end = child_of(pid), time.monotonic() + 60 * minutes
    rows: list[tuple[float, dict[str, float], dict[str, float]]] = []

    async def watch() -> None:
        while True:
            rows.append((time.monotonic() / 3600, sample(pid), sample(engine)))
            print(json.dumps({"hours": rows[-1][0], "front": rows[-1][1], "engine": rows[-1][2]}), flush=True)
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.ensure_future(watch())
    open_requests: set[asyncio.Task[None]] = set()
    while time.monotonic() < end:
        task = asyncio.ensure_future(send(client, rng, seen))
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*open_requests)
    client.close()
    await asyncio.sleep(2)
    rows.append((time.monotonic() / 3600, sample(pid), sample(engine)))
    watching.cancel()
    print(json.dumps(seen))
    late = rows[len(rows) // 3 :]
    hours = np.array([row[0] for row in late])
    for name, at in (("front-end", 1), ("engine", 2)):
        for what in ("anon_mb", "fds", "threads"):
            values = np.array([row[at][what] for row in late])  # type: ignore[index]
            slope = np.polyfit(hours, values, 1)[0]
            span = f"{values[0]:.1f} to {values[-1]:.1f}, at most {values.max():.1f}"
            print(f"{name} {what}: {span}, slope {slope:.2f} per hour")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "pace",
        "serve",
        "demo",
        "--port",
        "0",
        "--threads",
        "1",
        "--no-access-log",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = next(found[1] for line in server.stderr if (found := re.search(r" at (\S+)\]", line)))
        asyncio.run(soak(url, server.pid, args.minutes, args.rate, args.seed))
    finally:
        server.terminate()
        print("exit code", server.wait(60))


if __name__ == "__main__":
    main()
