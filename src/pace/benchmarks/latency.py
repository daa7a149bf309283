"""Prefill and decode speed of a model, as tokens/s and as shares of the machine's roofs.

The memory bus of a shared machine is not the same from one second to the next. So a roof is measured before
and after every repetition, each repetition is compared with its own, and the median of these ratios is
reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import mean, median
from typing import Any

import numpy as np

from pace import ops
from pace.benchmarks import process
from pace.benchmarks.cost import Cost, step_cost
from pace.benchmarks.profile import Profiler, StepProfile, format_profiles
from pace.benchmarks.roofline import READ_BYTES, StepRoofs, measure_step
from pace.config import EngineConfig
from pace.engine.loader import Loaded
from pace.engine.memory import MemoryPlan
from pace.errors import PaceError
from pace.llm import LLM
from pace.params import SamplingParams
from pace.speculative import load

__all__ = ["LatencyResult", "format_latency", "longest", "most_steps_ahead", "run"]

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
        share_dot: of the dot roof.
        read_roof: bytes/s.
        dot_roof: operations/s, by the chosen tier's bf16 or int8 dot product as each matrix of the step takes its rows.
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
        profile: where the time of each phase's steps went; empty unless asked for.
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
    profile: list[StepProfile] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As a plain dict; prefill and decode apart."""
        values = asdict(self)
        phases = values.pop("phases")
        for name in ("prefill", "decode"):
            values[name] = [phase for phase in phases if phase["phase"] == name]
        return values


CHUNK = 256  # tokens of a prompt that a step reads at least, when there is room: what a windowed layer allows


def most_steps_ahead(n_seqs: int, n_context: int, max_num_batched_tokens: int) -> int:
    """Steps after which all sequences decode at the latest: those that read the prompts, during which the first ones
    decode already and take some of the rows, and one more."""
    room = max(1, max_num_batched_tokens - n_seqs)
    return -(-n_seqs * n_context // min(room, CHUNK)) + 1


def longest(
    input_lens: Sequence[int],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    output_len: int,
    repeat: int,
    max_num_batched_tokens: int,
) -> int:
    """The max_model_len that `run` needs for the same arguments."""
    ahead = most_steps_ahead(max(batch_sizes), max(contexts), max_num_batched_tokens)
    return max(max(input_lens) + 1, max(contexts) + ahead + repeat * output_len)


def run(
    config: EngineConfig,
    *,
    input_lens: Sequence[int],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    output_len: int,
    repeat: int,
    random_weights: bool = False,
    profile: bool = False,
    show_progress: bool | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
) -> LatencyResult:
    """Load a model and measure it.

    Args:
        config: its max_model_len is at least `longest`, its max_num_seqs the largest batch.
        input_lens: prompt lengths of the prefill measurements.
        batch_sizes: sequences of the decode measurements; each is combined with each of
        contexts: tokens that each of them has before it decodes.
        output_len: decode steps of one repetition.
        repeat: repetitions.
        random_weights: read only config.json.
        profile: also break the steps of each phase down by operator.
        on_plan: told of the memory before it is allocated.

    Raises:
        PaceError: the model can't be loaded, or a step failed.
    """
    loaded = load(
        config,
        show_progress=show_progress,
        skip_tokenizer=True,
        random_weights=random_weights,
        on_plan=on_plan,
    )
    try:
        bench = _Bench(config, loaded, profile)
        bench.first_token()
        first_token_s = process.age_s()
        peak_rss = process.peak_rss_bytes()
        phases = [bench.prefill(n, repeat) for n in input_lens]
        phases += [bench.decode(b, n, output_len, repeat) for n in contexts for b in batch_sizes]
        peak_rss = max(peak_rss, process.rss_bytes() - READ_BYTES)  # the roof's buffer is not the model's
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
        profile=bench.profiles,
    )


class _Bench:
    """Drives an engine with random prompts."""

    def __init__(self, config: EngineConfig, loaded: Loaded, profile: bool) -> None:
        self.loaded = loaded
        self.engine = loaded.engine
        self.llm = LLM.from_loaded(config, loaded)  # for its counters
        self.kv_cache_dtype = config.kv_cache_dtype
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.profile = profile
        self.profiles: list[StepProfile] = []
        self.experts: list[dict[str, int]] = []  # that each step chose, by operator
        self.rng = np.random.default_rng(0)
        self.n_requests = 0

    def first_token(self) -> None:
        self.submit(1, FIRST_PROMPT, 1)
        self.drain()

    def prefill(self, n_tokens: int, repeat: int) -> Phase:
        def once() -> Cost:
            self.drain()
            # A prompt may be several steps, which could have read each expert once.
            return self.cost([n_tokens], [n_tokens], 1, max)

        def prepare() -> None:
            self.submit(1, n_tokens, 1)

        return self.measure("prefill", 1, n_tokens, n_tokens, 1, repeat, once, prepare)

    def decode(self, n_seqs: int, n_context: int, n_steps: int, repeat: int) -> Phase:
        before = self.llm.stats()
        n_ahead = most_steps_ahead(n_seqs, n_context, self.max_num_batched_tokens)
        ids = self.submit(n_seqs, n_context, n_ahead + repeat * n_steps)
        for _ in range(n_ahead):
            n_sampled = self.llm.stats()["n_sampled"]
            self.step()
            if self.llm.stats()["n_sampled"] - n_sampled == n_seqs:
                break

        def once() -> Cost:
            n_sampled = self.llm.stats()["n_sampled"]
            for _ in range(n_steps):
                self.step()
            after = self.llm.stats()
            if after["n_sampled"] - n_sampled != n_steps * n_seqs:
                raise PaceError(
                    f"{n_seqs} sequences of {n_context} tokens do not run together; "
                    "give more kv_cache_memory, or measure fewer"
                )
            # The step in the middle stands for its repetition, and the mean length for all.
            kv_len = round((after["n_tokens"] - before["n_tokens"]) / n_seqs - n_steps / 2)
            return self.cost([1] * n_seqs, [kv_len] * n_seqs, n_seqs, mean)

        phase = self.measure("decode", n_seqs, n_context, n_seqs, n_steps, repeat, once, lambda: None)
        for request_id in ids:
            self.engine.abort(request_id)
        self.drain()
        return phase

    def measure(
        self,
        name: str,
        n_seqs: int,
        n_context: int,
        n_tokens: int,
        n_steps: int,
        repeat: int,
        once: Callable[[], Cost],
        prepare: Callable[[], None],
    ) -> Phase:
        """Time repetitions of `n_steps` steps; a roof stands between each two of them."""
        times, pythons, costs, roofs = [], [], [], [measure_step(self.loaded.team)]
        profiler = Profiler(self.loaded, self.kv_cache_dtype) if self.profile else None
        for _ in range(repeat):
            prepare()
            self.experts.clear()
            python_s = self.llm.stats()["python_s"]
            with profiler or nullcontext():
                start = time.perf_counter()
                costs.append(once())
                times.append((time.perf_counter() - start) / n_steps)
            pythons.append((self.llm.stats()["python_s"] - python_s) / n_steps)
            roofs.append(measure_step(self.loaded.team))
        between = [a.mean(b) for a, b in pairwise(roofs)]  # repetition i ran between roofs i and i + 1
        phase = _phase(name, n_seqs, n_context, n_tokens, times, pythons, costs, between)
        if profiler is not None:
            label = f" {n_seqs} x {n_context}"
            self.profiles += profiler.profiles(StepRoofs(*map(median, zip(*between, strict=True))), label)
        return phase

    def submit(self, n_seqs: int, n_tokens: int, n_output: int) -> list[str]:
        """Start requests of random prompts; returns their ids."""
        params = SamplingParams(temperature=0.0, max_tokens=n_output, ignore_eos=True, detokenize=False)
        ids = [str(self.n_requests + i) for i in range(n_seqs)]
        for request_id in ids:
            prompt = self.rng.integers(0, self.engine.preparer.vocab_size, n_tokens, dtype=np.int32)
            self.engine.submit(self.engine.prepare(request_id, prompt, params))
        self.n_requests += n_seqs
        return ids

    def step(self) -> None:
        for output in self.engine.step():
            if output.outputs[0].finish_reason == "error":
                raise PaceError(f"a step failed: {output.outputs[0].stop_reason}")
        self.experts.append(self.loaded.plan.op_experts())

    def drain(self) -> None:
        while self.engine.has_unfinished:
            self.step()

    def cost(
        self, q_len: list[int], kv_len: list[int], n_logit_rows: int, of: Callable[[list[int]], float]
    ) -> Cost:
        """Of a step, or of all since the last repetition, whose counts of chosen experts `of` makes one of."""
        steps = self.experts
        experts = {name: of([step.get(name, 0) for step in steps]) for name in steps[-1]}
        return step_cost(self.loaded.plan.ir, q_len, kv_len, n_logit_rows, self.kv_cache_dtype, experts)


def _phase(
    name: str,
    n_seqs: int,
    n_context: int,
    n_tokens: int,
    times: list[float],
    pythons: list[float],
    costs: list[Cost],
    roofs: list[StepRoofs],
) -> Phase:
    """Medians over the repetitions."""
    return Phase(
        phase=name,
        n_seqs=n_seqs,
        n_context=n_context,
        tokens_per_s=n_tokens / median(times),
        step_s=median(times),
        python_s=median(pythons),
        share_read=median(c.n_bytes / t / r.read for c, t, r in zip(costs, times, roofs, strict=True)),
        share_dot=median(r.dot_s(c) / t for c, t, r in zip(costs, times, roofs, strict=True)),
        read_roof=median(r.read for r in roofs),
        dot_roof=median(r.dot(c) for c, r in zip(costs, roofs, strict=True)),
    )


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
    if result.profile:
        lines += ["", format_profiles(result.profile)]
    return "\n".join(lines)
