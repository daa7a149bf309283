"""Mixtures of experts: the two products of a layer over the experts that random rows choose.

    python -m pytest bench/bench_experts.py --benchmark-enable -k "avx512bf16 and qwen3"

GB/s count the chosen experts' weights once, FLOPs are 2 k n of every row and each of its experts. Few rows are judged by
the read roof, many by the dot roof; both shares are printed. With few rows a step runs three layers, so that what is chosen
comes from memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import report, team
from ext.kit import build, put, rng, rows_batch

from pace import ops
from pace.models import plan as ir


@dataclass(frozen=True)
class ExpertsCase:
    """A layer's experts: what a model of that name has."""

    name: str
    n_experts: int
    top_k: int
    dim: int
    width: int
    format: ir.WeightFormat = "bf16"
    int8: bool = False
    clamped: bool = False


CASES = (
    ExpertsCase("qwen3-30b", 128, 8, 2048, 768),
    ExpertsCase("gpt-oss", 32, 4, 2880, 2880, "mxfp4", clamped=True),
    ExpertsCase("gpt-oss-int8", 32, 4, 2880, 2880, "mxfp4", int8=True, clamped=True),
)
ROWS = (1, 8, 64, 512)


def experts(team: ops.Team, case: ExpertsCase, n: int, k: int) -> ops.PackedMatrix:
    """Matrices of random weights; all experts have the same numbers, each its own memory."""
    matrix = ops.PackedMatrix(team, n, k, case.n_experts, case.format)
    source = rng(case.name, n, k)
    if case.format == "mxfp4":
        blocks = source.integers(0, 256, (n, k // 2), np.uint8)
        scales = source.integers(117, 122, (n, k // 32), np.uint8)
        for e in range(case.n_experts):
            matrix.pack_mxfp4(blocks, scales, matrix=e)
    else:
        rows = source.standard_normal((n, k), np.float32)
        for e in range(case.n_experts):
            matrix.pack(rows, "f32", matrix=e)
    return matrix


def experts_plan(team: ops.Team, case: ExpertsCase, rows: int) -> tuple[ops.Plan, int]:
    """Layers of experts in one step, and how many."""
    n_layers = 3 if rows <= 8 else 1
    slots = [
        ir.Slot("l", case.n_experts, "f32", "tokens"),
        ir.Slot("route", 2 * case.top_k, "f32", "tokens"),
        ir.Slot("x", case.dim, "bf16", "tokens"),
        ir.Slot("inner", case.width, "bf16", "tokens", case.top_k),
    ]
    if case.int8:
        slots += [
            ir.Slot("x8", case.dim, "int8", "tokens"),
            ir.Slot("inner8", case.width, "int8", "tokens", case.top_k),
        ]
    slots.append(ir.Slot("y", case.dim, "f32", "tokens"))
    clamp: dict[str, Any] = {"alpha": 1.702, "limit": 7.0} if case.clamped else {}
    plan_ops: list[ir.Op] = [ir.Route("r", "l", "route", case.top_k, renormalise=True)]
    weights: dict[str, Any] = {}
    for i in range(n_layers):
        weights[f"in{i}"] = experts(team, case, 2 * case.width, case.dim)
        weights[f"out{i}"] = experts(team, case, case.dim, case.width)
        src, inner = ("x8", "inner8") if case.int8 else ("x", "inner")
        if case.int8:
            plan_ops.append(ir.Quantise(f"q{i}", "x", "x8"))
        plan_ops.append(
            ir.ExpertsIn(
                f"i{i}",
                src,
                "inner",
                "route",
                f"in{i}",
                case.n_experts,
                case.width,
                format=case.format,
                **clamp,
            )
        )
        if case.int8:
            plan_ops.append(ir.Quantise(f"p{i}", "inner", "inner8", case.top_k))
        plan_ops.append(
            ir.ExpertsOut(f"o{i}", inner, "y", "route", f"out{i}", case.n_experts, format=case.format)
        )
    return build(team, plan_ops, slots, weights, max_tokens=rows), n_layers


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_experts(
    benchmark: Any, capsys: pytest.CaptureFixture[str], case: ExpertsCase, rows: int, isa: str
) -> None:
    with ops.using_isa(isa):
        threads = team()
        plan, n_layers = experts_plan(threads, case, rows)
        source = rng("rows")
        put(plan, "l", source.standard_normal((rows, case.n_experts)))
        put(plan, "x", source.standard_normal((rows, case.dim)) / 64)
        batch = rows_batch(rows)
        plan.step(batch)
        benchmark.pedantic(plan.step, (batch,), rounds=7, iterations=1)
        active = len(np.unique(plan.slot("route")[:, : case.top_k]))
        weights = 3 * case.dim * case.width * n_layers
        bits = 16 if case.format == "bf16" else 4.25
        report(
            benchmark,
            capsys,
            threads,
            isa,
            f"{case.name} m={rows}",
            weights * active * bits / 8,
            2 * weights * rows * case.top_k,
        )
        threads.close()
