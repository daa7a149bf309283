"""Prefill and decode speed of a model, as tokens/s and as shares of the machine's roofs.

The memory bus of a shared machine is not the same from one second to the next. So a roof is measured before
and after every repetition, each repetition is compared with its own, and the median of these ratios is
reported.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pace import ops
from pace.benchmarks.cost import Cost, step_cost
from pace.benchmarks.roofline import READ_BYTES, measure_dot, measure_read
from pace.config import EngineConfig
from pace.engine.core import Engine
from pace.engine.loader import Loaded, load
from pace.errors import PaceError
from pace.params import SamplingParams

__all__ = ["LatencyResult", "format_latency", "run"]

FIRST_PROMPT = 8  # tokens of the prompt behind first_token_s


@dataclass(frozen=True)
class Phase:
    """One line of the table; medians over the repetitions.

    Attributes:
        phase: "prefill" or "decode".
        n_seqs: sequences in the step.
        n_context: prompt tokens of each.
        tokens_per_s: prompt tokens (prefill) or sampled tokens (decode) of all sequences.
        step_s: time of the prompt, or of one decode step; sampling and Python included.
        python_s: of that, outside the kernels.
        share_read: of the memory-read roof, weights and KV counted once.
        share_dot: of the chosen tier's bf16 dot roof.
        read_roof: bytes/s.
        dot_roof: operations/s.
    """

    phase: str
    n_seqs: int
    n_context: int
    tokens_per_s: float
    step_s: float
    python_s: float
    share_read: float
    share_dot: float
    read_roof: float
    dot_roof: float


@dataclass(frozen=True)
class LatencyResult:
    """Everything that one run found.

    Attributes:
        load_s: from the configuration to an engine.
        first_token_s: from the start of the process to the first token.
        peak_rss_bytes: of loading, or of the largest step if that is more.
        weights_bytes: packed.
        kv_bytes: reserved for the KV pool; only what was used counts in peak_rss_bytes.
    """

    model: str
    isa: str
    n_threads: int
    load_s: float
    first_token_s: float
    peak_rss_bytes: int
    weights_bytes: int
    kv_bytes: int
    phases: list[Phase]

    def to_json(self) -> dict[str, Any]:
        """As a plain dict; prefill and decode apart."""
        values = asdict(self)
        phases = values.pop("phases")
        for name in ("prefill", "decode"):
            values[name] = [phase for phase in phases if phase["phase"] == name]
        return values


def run(
    config: EngineConfig,
    *,
    input_lens: Sequence[int],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    output_len: int,
    repeat: int,
    random_weights: bool = False,
    show_progress: bool | None = None,
) -> LatencyResult:
    """Load a model and measure it.

    Args:
        config: its max_model_len, max_num_seqs and max_num_batched_tokens are to fit the lengths below.
        input_lens: prompt lengths of the prefill measurements.
        batch_sizes: sequences of the decode measurements; each is combined with each of
        contexts: tokens that each of them has before it decodes.
        output_len: decode steps of one repetition.
        repeat: repetitions.
        random_weights: read only config.json.

    Raises:
        PaceError: the model can't be loaded, or a step failed.
    """
    loaded = load(config, show_progress=show_progress, skip_tokenizer=True, random_weights=random_weights)
    try:
        bench = _Bench(loaded)
        bench.first_token()
        first_token_s = _process_age_s()
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        phases = [bench.prefill(n, repeat) for n in input_lens]
        phases += [bench.decode(b, n, output_len, repeat) for n in contexts for b in batch_sizes]
        peak_rss = max(peak_rss, _resident_bytes() - READ_BYTES)  # the roof's buffer is not the model's
    finally:
        loaded.team.close()
    return LatencyResult(
        model=config.model,
        isa=ops.isa(),
        n_threads=loaded.team.n_threads,
        load_s=loaded.load_s,
        first_token_s=first_token_s,
        peak_rss_bytes=peak_rss,
        weights_bytes=loaded.weights_bytes,
        kv_bytes=loaded.memory.kv_bytes,
        phases=phases,
    )


class _Bench:
    """Drives an engine with random prompts."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.engine: Engine = loaded.engine
        self.ir = loaded.plan.ir
        self.rng = np.random.default_rng(0)
        self.n_requests = 0

    def first_token(self) -> None:
        self.submit(1, FIRST_PROMPT, 1)
        self.drain()

    def prefill(self, n_tokens: int, repeat: int) -> Phase:
        cost = step_cost(self.ir, [n_tokens], [n_tokens], 1)
        times, pythons, roofs = [], [], [self.roofs()]
        for _ in range(repeat):
            self.submit(1, n_tokens, 1)
            elapsed, python_s = self.timed(None)
            times.append(elapsed)
            pythons.append(python_s)
            roofs.append(self.roofs())
        return _phase("prefill", 1, n_tokens, n_tokens, times, pythons, [cost] * repeat, roofs)

    def decode(self, n_seqs: int, n_context: int, n_steps: int, repeat: int) -> Phase:
        self.submit(n_seqs, n_context, 1 + repeat * n_steps)
        while self.engine.scheduler.waiting or self.engine.stats.n_steps == 0 or self.reading():
            self.step()
        times, pythons, costs, roofs = [], [], [], [self.roofs()]
        done = n_context
        for _ in range(repeat):
            elapsed, python_s = self.timed(n_steps)
            times.append(elapsed / n_steps)
            pythons.append(python_s / n_steps)
            # The step in the middle stands for its repetition.
            costs.append(step_cost(self.ir, [1] * n_seqs, [done + (n_steps + 1) // 2] * n_seqs, n_seqs))
            done += n_steps
            roofs.append(self.roofs())
        self.drain()
        return _phase("decode", n_seqs, n_context, n_seqs, times, pythons, costs, roofs)

    def submit(self, n_seqs: int, n_tokens: int, n_output: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=n_output, ignore_eos=True, detokenize=False)
        for _ in range(n_seqs):
            prompt = self.rng.integers(0, self.engine.vocab_size, n_tokens, dtype=np.int32)
            self.engine.add_request(str(self.n_requests), prompt, params)
            self.n_requests += 1

    def reading(self) -> bool:
        """Whether a request has not even started, or a prompt is still being read."""
        running = self.engine.scheduler.running
        return not running or any(seq.n_tokens - seq.n_computed > 1 for seq in running)

    def step(self) -> None:
        for output in self.engine.step():
            if output.outputs[0].finish_reason == "error":
                raise PaceError(f"a step failed: {output.outputs[0].stop_reason}")

    def timed(self, n_steps: int | None) -> tuple[float, float]:
        """Run so many steps, or until nothing is left; seconds in all, and in Python."""
        python_s = self.engine.stats.python_s
        start = time.perf_counter()
        if n_steps is None:
            self.drain()
        else:
            for _ in range(n_steps):
                self.step()
        return time.perf_counter() - start, self.engine.stats.python_s - python_s

    def drain(self) -> None:
        while self.engine.has_unfinished:
            self.step()

    def roofs(self) -> tuple[float, float]:
        return measure_read(self.loaded.team), measure_dot(self.loaded.team)


def _phase(
    name: str,
    n_seqs: int,
    n_context: int,
    n_tokens: int,
    times: list[float],
    pythons: list[float],
    costs: list[Cost],
    roofs: list[tuple[float, float]],
) -> Phase:
    """Medians; repetition i ran between roofs i and i + 1."""
    reads = [(a[0] + b[0]) / 2 for a, b in pairwise(roofs)]
    dots = [(a[1] + b[1]) / 2 for a, b in pairwise(roofs)]
    return Phase(
        phase=name,
        n_seqs=n_seqs,
        n_context=n_context,
        tokens_per_s=n_tokens / median(times),
        step_s=median(times),
        python_s=median(pythons),
        share_read=median(c.n_bytes / t / r for c, t, r in zip(costs, times, reads, strict=True)),
        share_dot=median(c.n_flops / t / r for c, t, r in zip(costs, times, dots, strict=True)),
        read_roof=median(reads),
        dot_roof=median(dots),
    )


def _process_age_s() -> float:
    """Seconds since this process was started, the interpreter's own start included."""
    # The name in field 2 may hold anything, spaces and brackets too; what follows it doesn't.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def format_latency(result: LatencyResult) -> str:
    """A table for people."""
    weights_gb, peak_gb = result.weights_bytes / 1e9, result.peak_rss_bytes / 1e9
    columns = ["seqs", "context", "tok/s", "step ms", "python ms", "of read", "of dot", "GB/s", "GOP/s"]
    lines = [
        f"{result.model}: {result.isa}, {result.n_threads} threads, weights {weights_gb:.2f} GB",
        f"load {result.load_s:.2f} s, first token {result.first_token_s:.2f} s, peak memory {peak_gb:.2f} GB",
        "",
        f"{'phase':8}" + "".join(f"{column:>10}" for column in columns),
    ]
    for p in result.phases:
        cells = [f"{p.n_seqs}", f"{p.n_context}", f"{p.tokens_per_s:.1f}", f"{p.step_s * 1e3:.2f}"]
        cells += [f"{p.python_s * 1e3:.3f}", f"{p.share_read:.2f}", f"{p.share_dot:.2f}"]
        cells += [f"{p.read_roof / 1e9:.1f}", f"{p.dot_roof / 1e9:.0f}"]
        lines.append(f"{p.phase:8}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
