"""MXFP4 weights in the shapes of gpt-oss' experts, on bf16 and on int8 rows; GB/s count packed bytes once.

    python -m pytest bench/bench_mxfp4.py --benchmark-enable -k "avx512bf16 and gate-up"

Shares are of the read roof and of the mode's own dot roof.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import STREAM_BYTES, report, team
from ext.kit import build, put, rng, rows_batch

from pace import ops
from pace.models import plan as ir

DIM = 2880
ROWS = (1, 2, 4, 8, 13, 32, 64, 512)


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mode", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["gate-up", "down"])
def test_mxfp4(
    benchmark: Any, capsys: pytest.CaptureFixture[str], name: str, mode: str, rows: int, isa: str
) -> None:
    n, r = (2 * DIM if name == "gate-up" else DIM), rng(name)
    blocks = r.integers(0, 256, (n, DIM // 32, 16), np.uint8)
    scales = r.integers(117, 128, (n, DIM // 32), np.uint8)
    with ops.using_isa(isa):
        threads = team()
        matrix = ops.PackedMatrix(threads, n, DIM, format="mxfp4")
        n_copies = STREAM_BYTES // 2 // matrix.nbytes if rows <= 64 else 1
        weights = {"w0": matrix} | {
            f"w{i}": ops.PackedMatrix(threads, n, DIM, format="mxfp4") for i in range(1, n_copies)
        }
        for weight in weights.values():
            weight.pack_mxfp4(blocks, scales)
        slots = [
            ir.Slot("a", DIM, "bf16", "tokens"),
            ir.Slot("q", DIM, "int8", "tokens"),
            ir.Slot("c", DIM, "bf16" if name == "gate-up" else "f32", "tokens"),
        ]
        src = "q" if mode == "int8" else "a"
        gated: dict[str, Any] = {"epilogue": "gated", "act": "silu"} if name == "gate-up" else {}
        gemms: list[ir.Op] = [ir.Gemm(f"g{i}", src, "c", f"w{i}", **gated) for i in range(n_copies)]
        plan = build(threads, [ir.Quantise("q", "a", "q"), *gemms], slots, weights, max_tokens=rows)
        put(plan, "a", r.standard_normal((rows, DIM)))
        batch = rows_batch(rows)
        plan.step(batch)
        benchmark.pedantic(plan.step, (batch,), rounds=7, iterations=1)
        size, flops = n_copies * matrix.nbytes, 2.0 * n_copies * n * DIM * rows
        report(benchmark, capsys, threads, isa, f"{name} {mode} m={rows}", size, flops, mode)
        threads.close()
