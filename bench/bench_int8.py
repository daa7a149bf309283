"""int8 and int4 weights by int8 rows on the matrices of Llama-3.2-1B; GB/s count packed bytes once.

    python -m pytest bench/bench_int8.py --benchmark-enable -k "amx and gate-up"

Shares are of the read roof and of the tier's int8 dot roof.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import GEMMS, STREAM_BYTES, GemmCase, report, team
from ext.kit import build, put, rng, rows_batch

from pace import ops
from pace.models import plan as ir
from pace.models.weight_formats import int8_group

ROWS = (1, 2, 4, 8, 13, 16, 32, 64, 128, 512)
FORMATS = ("int8", "int8g128", "int8g32", "int4g128", "int4g32", "mxfp4")


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", GEMMS[2:4], ids=[case.name for case in GEMMS[2:4]])
def test_int8_rows(
    benchmark: Any, capsys: pytest.CaptureFixture[str], case: GemmCase, format: str, rows: int, isa: str
) -> None:
    with ops.using_isa(isa):
        threads = team()
        plan, n_copies, size = int8_plan(threads, case, format, rows)
        put(plan, "a", rng(case.name).standard_normal((rows, case.k)))
        plan.slot("c")[...] = 0
        batch = rows_batch(rows)
        plan.step(batch)
        benchmark.pedantic(plan.step, (batch,), rounds=7, iterations=1)
        ops_of_step = 2.0 * n_copies * case.n * case.k * rows
        report(benchmark, capsys, threads, isa, f"{case.name} {format} m={rows}", size, ops_of_step, "int8")
        threads.close()


def int8_plan(team: ops.Team, case: GemmCase, format: str, rows: int) -> tuple[ops.Plan, int, int]:
    """As many copies of a matrix of random codes as few rows need to come from memory, how many those are, and their
    bytes together.
    """
    matrix = ops.PackedMatrix(team, case.n, case.k, format=format)
    n_copies = max(1, STREAM_BYTES // 2 // matrix.nbytes) if rows <= 64 else 1
    more = [ops.PackedMatrix(team, case.n, case.k, format=format) for _ in range(n_copies - 1)]
    weights = {f"w{i}": weight for i, weight in enumerate([matrix, *more])}
    source = np.random.Generator(np.random.PCG64(1)).standard_normal((case.n, case.k), np.float32)
    for weight in weights.values():
        if format == "mxfp4":
            random = np.random.Generator(np.random.PCG64(1))
            blocks = random.integers(0, 256, (case.n, case.k // 32, 16), np.uint8)
            weight.pack_mxfp4(blocks, random.integers(117, 128, (case.n, case.k // 32), np.uint8))
        else:
            weight.pack(source, "f32")
    group = int8_group(format) or 0
    slots = [
        ir.Slot("a", case.k, "bf16", "tokens"),
        ir.Slot("q", case.k, "int8", "tokens", group=group),
        ir.Slot("c", case.width, case.dtype, "tokens"),
    ]
    gemms: list[ir.Op] = [
        ir.Gemm(f"g{i}", "q", "c", f"w{i}", epilogue=case.epilogue, act=case.act, scale=1e-3)
        for i in range(n_copies)
    ]
    plan = build(team, [ir.Quantise("q", "a", "q"), *gemms], slots, weights, max_tokens=rows)
    return plan, n_copies, n_copies * matrix.nbytes
