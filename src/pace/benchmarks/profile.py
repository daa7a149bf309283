"""Where the time of a step goes: seconds per kind of operator, beside what each must read and compute.

Steps of which every sequence runs one row are "decode"; all others, mixed ones included, are "prefill".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.benchmarks.cost import Cost, op_costs, op_kind, rowwise_bytes
from pace.benchmarks.roofline import StepRoofs
from pace.engine.loader import Loaded
from pace.models.plan import Batch, F32Array, I32Array

__all__ = ["OpProfile", "Profiler", "StepProfile", "format_profiles", "wrapped"]

OUTSIDE = ("launch", "sampler", "scheduler/python")
"""Parts of a step that are no operators: entering and leaving the plan, drawing tokens, and all the rest."""


@dataclass(frozen=True)
class OpProfile:
    """All operators of one kind in an average step.

    Attributes:
        kind: "qkv", "attention", …; also "sampler", "scheduler/python" and "launch", the plan's time outside
            its operators.
        seconds: time of the kind.
        share: of the step.
        n_bytes: weights, keys and values that are read; of row-wise operators, which need none of these, the
            activations, which come from the caches.
        n_flops: 2 per multiply-add.
        roof_share: of the read roof or of the dot roof, whichever is more.
    """

    kind: str
    seconds: float
    share: float
    n_bytes: float
    n_flops: float
    roof_share: float


@dataclass(frozen=True)
class StepProfile:
    """An average step.

    Attributes:
        phase: "decode" or "prefill", with whatever the benchmark adds to tell its cases apart.
        n_steps: steps averaged.
        n_seqs, n_rows: sequences and rows of a step, on average.
        step_s: time of a step.
        read_roof: bytes/s, measured in the same run.
        dot_roof: operations/s of the step's dot products, bf16 and int8 as they are mixed, measured in the same run.
        ops: in order of execution.
    """

    phase: str
    n_steps: int
    n_seqs: float
    n_rows: float
    step_s: float
    read_roof: float
    dot_roof: float
    ops: list[OpProfile]

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


@dataclass
class _Step:
    """One recorded step; seconds. `step_s` leaves out what recording cost."""

    q_len: I32Array
    kv_len: I32Array
    n_logit_rows: int
    op_s: npt.NDArray[np.float64]
    run_s: float
    experts: dict[str, int]
    sample_s: float = 0.0
    step_s: float = 0.0

    @property
    def phase(self) -> str:
        return "decode" if int(self.q_len.max()) == 1 else "prefill"


class Profiler:
    """Records every step of an engine inside its with block.

    It stands between the engine and its plan and sampler, so the engine itself knows nothing of it. Keeping
    a step costs tens of microseconds, which the recorded times leave out and the wall clock does not.
    """

    def __init__(self, loaded: Loaded, kv_cache_dtype: str = "bf16") -> None:
        self._loaded = loaded
        self._kv_cache_dtype = kv_cache_dtype
        self._steps: list[_Step] = []
        self._current: _Step | None = None
        self._hidden_s = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> Profiler:
        engine = self._loaded.engine
        for owner, name, wrapper in (
            (self._loaded.plan, "step", self._run),
            (engine.sampler, "sample", self._sample),
            (engine, "step", self._step),
        ):
            self._stack.enter_context(wrapped(owner, name, wrapper))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _run(self, step: Callable[[Batch], F32Array], batch: Batch) -> F32Array:
        start = time.perf_counter()
        logits = step(batch)
        end = time.perf_counter()
        op_s = np.array([seconds for _, seconds in self._loaded.plan.op_times()])
        self._current = _Step(
            np.diff(batch.q_start),
            batch.kv_len.copy(),
            len(batch.logit_rows),
            op_s,
            end - start,
            self._loaded.plan.op_experts(),
        )
        self._hidden_s = time.perf_counter() - end
        return logits

    def _sample(self, sample: Callable[..., Any], *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        drawn = sample(*args, **options)
        if self._current is not None:
            self._current.sample_s += time.perf_counter() - start
        return drawn

    def _step(self, step: Callable[[], Any]) -> Any:
        self._current = None
        start = time.perf_counter()
        outputs = step()
        elapsed = time.perf_counter() - start
        if self._current is not None:
            self._current.step_s = elapsed - self._hidden_s
            self._steps.append(self._current)
        return outputs

    def profiles(self, roofs: StepRoofs, label: str = "") -> list[StepProfile]:
        """Averages of what was recorded: of decode steps, then of prefill steps, where there were any.

        Args:
            roofs: measured in the same run.
            label: added to the phase's name.
        """
        found = []
        for phase in ("decode", "prefill"):
            steps = [step for step in self._steps if step.phase == phase]
            if steps:
                found.append(self._average(f"{phase}{label}", steps, roofs))
        return found

    def _average(self, phase: str, steps: list[_Step], roofs: StepRoofs) -> StepProfile:
        n = len(steps)
        step_s = sum(step.step_s for step in steps) / n
        op_s = sum((step.op_s for step in steps), np.zeros(len(steps[0].op_s))) / n
        seconds: dict[str, float] = {}
        for (name, _), mean_s in zip(self._loaded.plan.op_times(), op_s.tolist(), strict=True):
            seconds[op_kind(name)] = seconds.get(op_kind(name), 0.0) + mean_s
        run_s = sum(step.run_s for step in steps) / n
        sample_s = sum(step.sample_s for step in steps) / n
        outside = (run_s - float(op_s.sum()), sample_s, step_s - run_s - sample_s)
        seconds |= dict(zip(OUTSIDE, outside, strict=True))
        costs = self._costs(steps)
        return StepProfile(
            phase=phase,
            n_steps=n,
            n_seqs=sum(len(step.q_len) for step in steps) / n,
            n_rows=sum(int(step.q_len.sum()) for step in steps) / n,
            step_s=step_s,
            read_roof=roofs.read,
            dot_roof=roofs.dot(sum(costs.values(), Cost())),
            ops=[_op_profile(kind, s, step_s, costs.get(kind, Cost()), roofs) for kind, s in seconds.items()],
        )

    def _costs(self, steps: Sequence[_Step]) -> dict[str, Cost]:
        """By kind, of the average step."""
        plan, dtype = self._loaded.plan.ir, self._kv_cache_dtype
        totals: dict[str, Cost] = {}
        for step in steps:
            q_len, kv_len, n_logit_rows = step.q_len.tolist(), step.kv_len.tolist(), step.n_logit_rows
            costs = op_costs(plan, q_len, kv_len, n_logit_rows, dtype, step.experts)
            for op, cost in costs:
                cost += Cost(float(rowwise_bytes(plan, op, sum(q_len), n_logit_rows, dtype)))
                kind = op_kind(op.name)
                totals[kind] = totals.get(kind, Cost()) + cost
        n = len(steps)
        logits = sum(step.n_logit_rows for step in steps) * plan.vocab_size * 4.0
        totals["sampler"] = Cost(logits)
        return {kind: cost / n for kind, cost in totals.items()}


def _op_profile(kind: str, seconds: float, step_s: float, cost: Cost, roofs: StepRoofs) -> OpProfile:
    best = max(cost.n_bytes / roofs.read, roofs.dot_s(cost))
    return OpProfile(
        kind, seconds, seconds / step_s, cost.n_bytes, cost.n_flops, best / seconds if seconds > 0 else 0.0
    )


@contextmanager
def wrapped(owner: object, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let `owner.name(...)` call `wrapper(the method, ...)` for the length of a with block."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: wrapper(method, *args, **options))
    try:
        yield
    finally:
        delattr(owner, name)  # the class's own method shows again


def format_profiles(profiles: Sequence[StepProfile]) -> str:
    """A table per profile, for people."""
    lines = []
    for p in profiles:
        lines += [
            "",
            f"{p.phase}: {p.n_steps} steps of {p.n_seqs:.1f} sequences and {p.n_rows:.1f} rows",
            f"{p.step_s * 1e3:.3f} ms each; roofs {p.read_roof / 1e9:.1f} GB/s, {p.dot_roof / 1e9:.0f} GFLOP/s",
            f"{'operator':<18}"
            + "".join(f"{c:>10}" for c in ("us", "share", "MB", "GFLOP", "GB/s", "GFLOP/s", "of roof")),
        ]
        for op in p.ops:
            cells = [f"{op.seconds * 1e6:.1f}", f"{op.share:.1%}"]
            cells += [f"{op.n_bytes / 1e6:.2f}" if op.n_bytes else ""]
            cells += [f"{op.n_flops / 1e9:.3f}" if op.n_flops else ""]
            cells += [f"{op.n_bytes / op.seconds / 1e9:.1f}" if op.n_bytes and op.seconds > 0 else ""]
            cells += [f"{op.n_flops / op.seconds / 1e9:.1f}" if op.n_flops and op.seconds > 0 else ""]
            cells += [f"{op.roof_share:.2f}" if op.roof_share else ""]
            lines.append(f"{op.kind:<18}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines[1:])
