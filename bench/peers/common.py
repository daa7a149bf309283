"""What every engine is asked: seconds for `batch` prompts of `n_prompt` random ids and `n_new` greedy tokens each.

Prefill is n_prompt / t(1, n_prompt, 1). Decode is (n - 1) * batch / (t(batch, 128, n) - t(batch, 128, 1)), so that the
prompt and every fixed cost of a call cancel out. Medians of the repetitions.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from statistics import median

Generate = Callable[[list[list[int]], int], None]

PREFILL = (128, 512, 1920)
DECODE = (1, 8, 32)
NEW_TOKENS = 17


def prompts(batch: int, n_prompt: int) -> list[list[int]]:
    """Random ids, the same in every engine."""
    rng = random.Random(batch * 10007 + n_prompt)
    return [[rng.randrange(1000, 100000) for _ in range(n_prompt)] for _ in range(batch)]


def measure(generate: Generate, repeat: int = 3) -> dict[str, float]:
    """Tokens/s by case."""

    def seconds(batch: int, n_prompt: int, n_new: int) -> float:
        start = time.perf_counter()
        generate(prompts(batch, n_prompt), n_new)
        return time.perf_counter() - start

    seconds(1, 128, 4)  # warm up
    result = {}
    for n in PREFILL:
        result[f"prefill {n}"] = n / median(seconds(1, n, 1) for _ in range(repeat))
    for batch in DECODE:
        steps = [seconds(batch, 128, NEW_TOKENS) - seconds(batch, 128, 1) for _ in range(repeat)]
        result[f"decode {batch}"] = batch * (NEW_TOKENS - 1) / median(steps)
    return result


def report(result: dict[str, float]) -> None:
    """Last line of the process: what compare.py reads."""
    print("RESULT " + json.dumps(result))
    sys.stdout.flush()
