"""What every engine is asked, in suites of cases: seconds for prompts of random ids and greedy tokens.

latency: prefill is n_prompt / t(1, n_prompt, 1), decode (n - 1) * batch / (t(batch, 32, n) - t(batch, 32, 1)), so
that the prompt and every fixed cost of a call cancel out; the prompts are short because the noise of reading them does
not (32 of 128 tokens took 18 s, their 16 steps 3). Medians of the repetitions, in tokens/s. decode: those cases alone.

throughput: cells of n sequences with prompts of so many tokens and 128 new ones each, all submitted at once: new
tokens per second of the whole. Each cell runs once per process.

A runner makes a `Generate` of its engine's public API and calls `run`, whose last line of output, RESULT and a JSON
object of tokens/s by case, is what compare.py reads.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

Generate = Callable[[list[list[int]], int], None]
"""Complete the prompts with exactly so many new tokens each, greedily."""

SUITES = ("latency", "decode", "throughput")
PREFILL = (128, 512, 1920)
DECODE = (1, 8, 32)
DECODE_PROMPT = 32
NEW_TOKENS = 33

CELLS = ("1x128", "8x128", "32x128", "1x1920", "8x1920", "32x1920")
CELL_TOKENS = 128
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 32
REPEAT = 3


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What compare.py tells a runner: the checkpoint, the suite and its cells."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--suite", choices=SUITES, default="latency")
    parser.add_argument("--cells", nargs="+", type=cell, default=list(CELLS), metavar="SEQUENCESxPROMPT")
    lengths(parser)
    parser.add_argument("--eager", action="store_true", help="vLLM: without torch.compile")
    return parser.parse_args(argv)


def lengths(parser: argparse.ArgumentParser) -> None:
    """Which cases the latency suites have."""
    parser.add_argument("--prefill", nargs="+", type=int, default=list(PREFILL), metavar="TOKENS")
    parser.add_argument("--decode", nargs="+", type=int, default=list(DECODE), metavar="SEQUENCES")


def cell(name: str) -> str:
    """A cell's name, checked."""
    n_seqs, n_prompt = split(name)
    if not (1 <= n_seqs <= MAX_NUM_SEQS and 1 <= n_prompt <= MAX_MODEL_LEN - CELL_TOKENS):
        raise ValueError(name)
    return name


def split(name: str) -> tuple[int, int]:
    """Sequences and prompt tokens of a cell."""
    n_seqs, n_prompt = name.split("x")
    return int(n_seqs), int(n_prompt)


def prompts(batch: int, n_prompt: int) -> list[list[int]]:
    """Random ids, the same in every engine."""
    rng = random.Random(batch * 10007 + n_prompt)
    return [[rng.randrange(1000, 100000) for _ in range(n_prompt)] for _ in range(batch)]


def run(generate: Generate, args: argparse.Namespace) -> None:
    """Measure what the arguments ask for, and report it."""

    def seconds(batch: int, n_prompt: int, n_new: int) -> float:
        asked = prompts(batch, n_prompt)
        start = time.perf_counter()
        generate(asked, n_new)
        return time.perf_counter() - start

    seconds(1, 128, 4)  # warm up
    if args.suite != "throughput":
        first = prefill(seconds, args.prefill) if args.suite == "latency" else {}
        report(first | decode(seconds, args.decode))
    else:
        result: dict[str, float] = {}
        for name in args.cells:
            n_seqs, n_prompt = split(name)
            try:
                result[name] = n_seqs * CELL_TOKENS / seconds(n_seqs, n_prompt, CELL_TOKENS)
            except (MemoryError, RuntimeError, ValueError) as error:
                print(f"{name}: {error}", file=sys.stderr)
            report(result)  # after every cell: an engine that is killed in the next one keeps these


def prefill(seconds: Callable[[int, int, int], float], lengths: Sequence[int]) -> dict[str, float]:
    """Tokens/s by case."""
    return {f"prefill {n}": n / median(seconds(1, n, 1) for _ in range(REPEAT)) for n in lengths}


def decode(seconds: Callable[[int, int, int], float], batches: Sequence[int]) -> dict[str, float]:
    """Tokens/s by case."""
    result = {}
    for batch in batches:
        steps = [
            seconds(batch, DECODE_PROMPT, NEW_TOKENS) - seconds(batch, DECODE_PROMPT, 1)
            for _ in range(REPEAT)
        ]
        result[f"decode {batch}"] = batch * (NEW_TOKENS - 1) / median(steps)
    return result


def report(result: dict[str, float]) -> None:
    """A line that compare.py reads; the last one counts."""
    print("RESULT " + json.dumps(result))
    sys.stdout.flush()
