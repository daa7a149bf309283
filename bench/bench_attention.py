"""Attention of one layer of Llama-3.2-1B (32 query heads, 8 KV heads of 64); the step includes the KV append.

    python -m pytest bench/bench_attention.py --benchmark-enable -k decode

GB/s count the K and V that are visible once per sequence, FLOPs 4 d per query head and visible position.
One layer's cache of 8k tokens is 16 MB, so below that the last-level cache may serve what a whole model
reads from memory: `pace bench latency` at 8k context judges that.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import ATTENTIONS, HEAD_DIM, N_HEADS, N_KV_HEADS, AttentionCase, attention_plan, report, team

from pace import ops


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize("case", ATTENTIONS, ids=[case.name for case in ATTENTIONS])
def test_attention(benchmark: Any, capsys: pytest.CaptureFixture[str], case: AttentionCase, isa: str) -> None:
    with ops.using_isa(isa):
        threads = team()
        plan, batch = attention_plan(threads, case)
        plan.step(batch)
        benchmark.pedantic(plan.step, (batch,), rounds=9, iterations=1)
        head_bytes = 2 * HEAD_DIM + 8 if case.dtype == "int8" else 4 * HEAD_DIM
        kv_bytes = case.n_seqs * case.kv_len * N_KV_HEADS * head_bytes
        pairs = case.rows * case.kv_len - case.rows * (case.rows - 1) // 2
        flops = case.n_seqs * pairs * N_HEADS * 4 * HEAD_DIM
        report(benchmark, capsys, threads, isa, case.name, kv_bytes, flops)
        threads.close()
