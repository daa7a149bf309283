"""The GEMM on the matrices of Llama-3.2-1B; GB/s count weights once, FLOPs are 2 m n k.

    python -m pytest bench/bench_gemm.py --benchmark-enable -k "amx and gate-up"

Few rows are judged by the read roof, many by the dot roof; both shares are printed.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import GEMM_ROWS, GEMMS, GemmCase, gemm_plan, report, team
from ext.kit import put, rng, rows_batch

from pace import ops


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize("rows", GEMM_ROWS)
@pytest.mark.parametrize("case", GEMMS, ids=[case.name for case in GEMMS])
def test_gemm(
    benchmark: Any, capsys: pytest.CaptureFixture[str], case: GemmCase, rows: int, isa: str
) -> None:
    with ops.using_isa(isa):
        threads = team()
        plan, n_copies = gemm_plan(threads, case, rows)
        put(plan, "a", rng(case.name).standard_normal((rows, case.k)))
        plan.slot("c")[...] = 0
        batch = rows_batch(rows)
        plan.step(batch)
        benchmark.pedantic(plan.step, (batch,), rounds=7, iterations=1)
        size = n_copies * case.n * case.k * 2
        report(benchmark, capsys, threads, isa, f"{case.name} m={rows}", size, size * rows)
        threads.close()
