"""Servers in turn under the same traces, open loop: output tokens/s and p99 of the time to the first token, per cell.

    python bench/peers/serve.py DIRECTORY --engine pace=.venv/bin/python --engine vllm=vllm/bin/python --rounds 3 \\
        --trace sharegpt-like burstgpt-like --rate 0.1 0.2 0.4 --requests 60

A cell is a trace at a rate (requests/s): the same prompts, output lengths and arrivals for every engine. Each round starts
each engine once, one at a time, and goes through all cells. A command of another engine may be given whole, with {model}
and {port} in it, such as AMD PACE 1.3.0's at its best (it needs numactl and, for its RoPE whatever is
configured, AVX-512 with BF16, and listens at two ports):

    --command 'amd_pace=amd/bin/pace-server --server_model {model} --router_port {port} --server_port 8001
        --router_host 127.0.0.1 --server_host 127.0.0.1 --serve_type continuous_batch --kv_cache_type SLAB_POOL
        --kv_cache_memory_gb 4 --op_config "{\\"norm_backend\\":\\"JIT\\",\\"lm_head_backend\\":\\"TPP\\"}"'

Where BF16 is missing, its slab pool and its paged cache end in errors, too. What runs is `--serve_type iterative
--kv_cache_type BMC` with "norm_backend" and "attention_backend" NATIVE, once the call of fused_rope_apply in its
rotary_embedding.py is left out, for which it has PyTorch code behind.

Run it with pace's Python; run_vllm.py says how to install vLLM. Its KV cache is 4 GiB unless VLLM_CPU_KVCACHE_SPACE is set.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from pace.benchmarks.serve import Load, run
from pace.benchmarks.serve_figures import summary
from pace.benchmarks.traces import TRACES, arrivals, shapes_of

START_S = 900.0  # vLLM compiles

COMMANDS = {
    "pace": "{python} -m pace serve {model} --port {port} --no-access-log --max-num-seqs 32 --kv-cache-memory 4GiB "
    "--max-model-len {length}",
    "vllm": "{python} -m vllm.entrypoints.openai.api_server --model {model} --port {port} --host 127.0.0.1 "
    "--dtype bfloat16 --max-num-seqs 32 --max-model-len {length}",
}

Cell = tuple[str, float]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a GET of it is answered with 200."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


@contextlib.contextmanager
def running(name: str, command: list[str], port: int, log: Path) -> Iterator[str]:
    """A server, for the length of a with block: its URL, when it is ready."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    env = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cpus} | env
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            if answers(f"{url}/health") or answers(f"{url}/v1/health"):  # AMD PACE has the second alone
                break
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{name} did not start; see {log}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # children that outlive it hold its memory
            os.killpg(process.pid, signal.SIGKILL)


def measure(url: str, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """One cell on one server."""
    trace, rate = cell
    seed = args.seed
    shapes = shapes_of(trace, args.requests, input_len=0, output_len=0, scale=args.length_scale, seed=seed)
    times = arrivals(args.requests, rate, burstiness=TRACES[trace].burstiness, seed=seed)
    load = Load(url, model=args.directory, max_concurrency=None, timeout_s=args.timeout)
    _, outcomes, seconds = asyncio.run(run(load, shapes, times.tolist(), seed=seed, show_progress=False))
    return summary(outcomes, seconds, percentiles=(50, 99))


def table(results: dict[str, dict[Cell, list[dict[str, Any]]]]) -> str:
    """Medians over the rounds by cell and engine; behind each engine but the first, the first's ratio to it."""
    first = next(iter(results))
    lines = []
    for title, key, is_rate in (
        ("output tokens/s", "output_throughput", True),
        ("p99 of time to first token, ms", "p99_ttft_ms", False),
        ("requests that failed", "failed", None),
    ):
        lines += ["", f"{title:<32}" + "".join(f"{name:>20}" for name in results)]
        for cell in results[first]:
            values = {name: median(one[key] for one in cells[cell]) for name, cells in results.items()}
            texts = [f"{values[first]:.1f}"]
            for name in [name for name in results if name != first]:
                better, worse = (first, name) if is_rate else (name, first)
                ratio = "" if is_rate is None else f" ({values[better] / max(values[worse], 1e-9):.2f} x)"
                texts.append(f"{values[name]:.1f}{ratio}")
            lines.append(f"{cell[0]} at {cell[1]:g}/s".ljust(32) + "".join(f"{text:>20}" for text in texts))
    return "\n".join(lines)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=PYTHON", help="pace or vllm")
    parser.add_argument("--command", action="append", default=[], metavar="NAME=COMMAND", help="any other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", nargs="+", choices=sorted(TRACES), default=sorted(TRACES))
    parser.add_argument("--rate", nargs="+", type=float, default=[0.1, 0.2, 0.4], help="requests/s")
    parser.add_argument("--requests", type=int, default=60, help="of a cell")
    parser.add_argument("--length-scale", type=float, default=1.0, help="of the traces' lengths")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds until a request is given up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--logs", type=Path, help="folder of the servers' logs (default: a new one among temporary files)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives this process
    commands = {name: COMMANDS[name].replace("{python}", python) for name, python in pairs(args.engine)}
    commands |= dict(pairs(args.command))
    if not commands:
        parser.error("name an --engine or a --command")
    logs = args.logs or Path(tempfile.mkdtemp(prefix="pace-serve-"))
    cells = [(trace, rate) for trace in args.trace for rate in args.rate]
    results: dict[str, dict[Cell, list[dict[str, Any]]]] = {
        name: {cell: [] for cell in cells} for name in commands
    }
    for _ in range(args.rounds):
        for name, command in commands.items():
            port = free_port()
            values = {"{model}": args.directory, "{port}": str(port), "{length}": str(args.max_model_len)}
            words = shlex.split(command)
            for mark, value in values.items():
                words = [word.replace(mark, value) for word in words]
            with running(name, words, port, logs / f"{name}.log") as url:
                for cell in cells:
                    figures = measure(url, cell, args)
                    results[name][cell].append(figures)
                    text = f"{figures['output_throughput']:.1f} tokens/s, p99 ttft {figures['p99_ttft_ms']:.0f} ms"
                    print(
                        f"{name} {cell[0]} at {cell[1]:g}/s: {text}, {figures['failed']} failed", flush=True
                    )
    print(table(results))


def pairs(given: list[str]) -> list[tuple[str, str]]:
    """NAME=VALUE taken apart."""
    return [(name, value) for name, _, value in (text.partition("=") for text in given)]


if __name__ == "__main__":
    main()
