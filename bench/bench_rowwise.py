"""Row-wise kernels at the sizes of Llama-3.2-1B; GB/s count every element read and written once.

    python -m pytest bench/bench_rowwise.py --benchmark-enable

At few rows everything sits in the caches, so shares above 100 % of the memory roof are as it should be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import DIM, HEAD_DIM, N_HEADS, N_KV_HEADS, QKV, VOCAB_SIZE, report, team
from ext.kit import build, packed, rng, rows_batch

from pace import ops
from pace.models import plan as ir

ISAS = pytest.mark.parametrize("isa", ops.isas())
ROWS = pytest.mark.parametrize("rows", [1, 32, 512])


def measure(
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    isa: str,
    name: str,
    n_bytes: float,
    make: Callable[[ops.Team], Callable[[], object]],
) -> None:
    """Time what `make` returns, on the tier."""
    with ops.using_isa(isa):
        threads = team()
        call = make(threads)
        call()
        benchmark.pedantic(call, rounds=9, iterations=5)
        report(benchmark, capsys, threads, isa, name, n_bytes)
        threads.close()


def step_of(plan: ops.Plan, rows: int) -> Callable[[], object]:
    batch = rows_batch(rows)
    return lambda: plan.step(batch)


@ISAS
@ROWS
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(
    benchmark: Any, capsys: pytest.CaptureFixture[str], kind: ir.NormKind, rows: int, isa: str
) -> None:
    def make(threads: ops.Team) -> Callable[[], object]:
        slots = [ir.Slot("x", DIM, "f32", "tokens"), ir.Slot("y", DIM, "bf16", "tokens")]
        weights = {"w": np.ones(DIM, np.float32)}
        plan = build(threads, [ir.Norm("n", "x", "y", "w", kind=kind)], slots, weights, max_tokens=rows)
        plan.slot("x")[...] = rng(1).standard_normal((rows, DIM))
        return step_of(plan, rows)

    measure(benchmark, capsys, isa, f"norm {kind} m={rows}", rows * DIM * 6, make)


@ISAS
@ROWS
def test_embed(benchmark: Any, capsys: pytest.CaptureFixture[str], rows: int, isa: str) -> None:
    def make(threads: ops.Team) -> Callable[[], object]:
        table = packed(threads, rng(2).standard_normal((97, DIM)))
        plan = build(
            threads,
            [ir.Embed("e", "x", "w")],
            [ir.Slot("x", DIM, "f32", "tokens")],
            {"w": table},
            max_tokens=rows,
        )
        return step_of(plan, rows)

    measure(benchmark, capsys, isa, f"embed m={rows}", rows * DIM * 6, make)


@ISAS
@ROWS
def test_rope(benchmark: Any, capsys: pytest.CaptureFixture[str], rows: int, isa: str) -> None:
    def make(threads: ops.Team) -> Callable[[], object]:
        rope = ir.Rope(
            (5e5 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32), 1.0, False, HEAD_DIM
        )
        slots = [ir.Slot("qkv", QKV, "f32", "tokens"), ir.Slot("q", N_HEADS * HEAD_DIM, "bf16", "tokens")]
        plan = build(
            threads,
            [ir.RopeKV("r", "qkv", "q", N_HEADS, 0, 0)],
            slots,
            kv=ir.KVLayer(N_KV_HEADS, HEAD_DIM),
            max_tokens=rows,
            ropes=(rope,),
        )
        plan.slot("qkv")[...] = rng(3).standard_normal((rows, QKV))
        return step_of(plan, rows)

    measure(benchmark, capsys, isa, f"rope m={rows}", rows * QKV * 6, make)


@ISAS
def test_softmax(benchmark: Any, capsys: pytest.CaptureFixture[str], isa: str) -> None:
    x = rng(4).standard_normal(VOCAB_SIZE).astype(np.float32)
    measure(benchmark, capsys, isa, "softmax 128k", VOCAB_SIZE * 8, lambda _: lambda: ops.softmax(x))


@ISAS
def test_argmax(benchmark: Any, capsys: pytest.CaptureFixture[str], isa: str) -> None:
    x = rng(5).standard_normal(VOCAB_SIZE).astype(np.float32)
    measure(benchmark, capsys, isa, "argmax 128k", VOCAB_SIZE * 4, lambda _: lambda: ops.argmax(x))


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize(
    "filters",
    [{"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}, {"n_logprobs": 5}],
    ids=["greedy", "plain", "top_k", "top_p", "logprobs"],
)
def test_sample(
    benchmark: Any, capsys: pytest.CaptureFixture[str], filters: dict[str, float], rows: int
) -> None:
    logits = (3 * rng(6).standard_normal((rows, VOCAB_SIZE))).astype(np.float32)
    params = np.zeros(rows, ops.SAMPLE_DTYPE)
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "n_logprobs": -1}
    for name, value in {**defaults, **filters}.items():
        params[name] = value

    def make(threads: ops.Team) -> Callable[[], object]:
        return lambda: ops.sample(threads, logits, params, [None] * rows)

    name = f"sample {next(iter(filters), 'plain')} m={rows}"
    measure(benchmark, capsys, ops.isa(), name, rows * VOCAB_SIZE * 4, make)
