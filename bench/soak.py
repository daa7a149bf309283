"""A mixed load on `pace serve demo` for a long time: does memory grow, do descriptors or threads leak?

    python bench/soak.py --minutes 30 --rate 3
    python bench/soak.py --minutes 4 --at-once 8 --only schema

Requests of every kind arrive as a Poisson process: streams that are read, streams that are left, whole answers, chats,
embeddings, JSON schemas, messages, responses, tokens, bad requests, /metrics. Every 10 seconds the memory, descriptors
and threads of front-end and engine are written down; at the end a line is fitted to each behind the first third.
`--at-once N` sends the next request when one of N has ended: hours of traffic in minutes, and growth is told per
request, too. `--only KIND` finds what makes it.
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
    "import", "def", "return", "class", "self", "for", "in", "range", "print", "None", "True", "while", "if", "else",
    "lambda", "yield", "with", "open", "as", "file",
]  # fmt: skip


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 60)))


def requests(rng: random.Random) -> list[tuple[str, str, dict[str, Any] | None, int]]:
    """A request of each kind: its name, path, body, and the status that it must have; 0: it is left midway."""
    chat = [{"role": "user", "content": text(rng)}]
    n = rng.randint(1, 60)
    return [
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


async def send(client: Client, rng: random.Random, only: str | None, seen: Counter[str]) -> None:
    """Send a request of a random kind, and count what became of it."""
    kind, path, body, expected = rng.choice([one for one in requests(rng) if only in (None, one[0])])
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


async def traffic(client: Client, args: argparse.Namespace, seen: Counter[str]) -> None:
    """Requests until the time is over; returns when all have ended."""
    rng, end = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    running: set[asyncio.Task[None]] = set()
    while time.monotonic() < end:
        running.add(asyncio.ensure_future(send(client, rng, args.only, seen)))
        if args.at_once is None:
            await asyncio.sleep(rng.expovariate(args.rate))
            running = {task for task in running if not task.done()}
        elif len(running) >= args.at_once:
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*running)


async def soak(url: str, pid: int, args: argparse.Namespace) -> None:
    """Send, and look at both processes meanwhile; then say what grew."""
    client, seen, engine = Client(url), Counter[str](), child_of(pid)
    rows: list[tuple[float, int, dict[str, float], dict[str, float]]] = []

    async def watch() -> None:
        while True:
            rows.append((time.monotonic() / 3600, seen.total(), sample(pid), sample(engine)))
            front, back = rows[-1][2:]
            print(json.dumps({"requests": seen.total(), "front": front, "engine": back}), flush=True)
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.ensure_future(watch())
    await traffic(client, args, seen)
    client.close()
    await asyncio.sleep(2)
    rows.append((time.monotonic() / 3600, seen.total(), sample(pid), sample(engine)))
    watching.cancel()
    print(json.dumps(seen))
    late = rows[len(rows) // 3 :]
    hours, counts = (np.array([row[at] for row in late]) for at in (0, 1))
    for name, at in (("front-end", 2), ("engine", 3)):
        for what in ("anon_mb", "fds", "threads"):
            values = np.array([row[at][what] for row in late])  # type: ignore[index]  # a row of JSON
            per_hour, per_request = (np.polyfit(x, values, 1)[0] for x in (hours, counts))
            span = f"{values[0]:.1f} to {values[-1]:.1f}, at most {values.max():.1f}"
            print(
                f"{name} {what}: {span}, slope {per_hour:.2f} per hour, {1e4 * per_request:.2f} per 10000 requests"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    parser.add_argument("--at-once", type=int, help="requests open at a time, in place of a rate")
    parser.add_argument("--only", choices=[one[0] for one in requests(random.Random())], help="one kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = ["--port", "0", "--threads", "1", "--no-access-log"]
    command = [sys.executable, "-m", "pace", "serve", "demo", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = next(found[1] for line in server.stderr if (found := re.search(r" at (\S+)\]", line)))
        asyncio.run(soak(url, server.pid, args))
    finally:
        server.terminate()
        print("exit code", server.wait(60))


if __name__ == "__main__":
    main()
