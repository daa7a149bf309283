"""Shapes of Llama-3.2-1B, and how a benchmark states a rate: GB/s or GFLOP/s and the share of the
measured roof.

The plans come from tests/ext/kit.py, the same that the tests drive; a roof is measured right after the
kernel it judges, by the same team, because other tenants change what the machine gives from second to
second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from ext.kit import build
from golden.harness import batch_of

from pace import ops
from pace.models import plan as ir

DIM, INNER, VOCAB_SIZE = 2048, 8192, 128_256
N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 64
QKV = (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM

STREAM_BYTES = 768 << 20
"""Weights of one measured step at few rows: more than the caches, so that they come from memory."""


@dataclass(frozen=True)
class GemmCase:
    """One matrix of the model: [n, k] and the epilogue it has there."""

    name: str
    n: int
    k: int
    epilogue: ir.Epilogue = "store"
    act: ir.Activation | None = None

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.epilogue == "gated" else self.n

    @property
    def dtype(self) -> ir.Dtype:
        return "bf16" if self.epilogue == "gated" else "f32"


GEMMS = (
    GemmCase("qkv", QKV, DIM),
    GemmCase("o", DIM, N_HEADS * HEAD_DIM, "add"),
    GemmCase("gate-up", 2 * INNER, DIM, "gated", "silu"),
    GemmCase("down", DIM, INNER, "add"),
    GemmCase("lm-head", VOCAB_SIZE, DIM),
)
GEMM_ROWS = (1, 2, 8, 13, 32, 64, 512)


@dataclass(frozen=True)
class AttentionCase:
    """Sequences of one step: n_seqs times `rows` rows at the end of kv_len tokens."""

    name: str
    n_seqs: int
    rows: int
    kv_len: int
    block_size: int = 64
    dtype: str = "bf16"
    contiguous: bool = False


ATTENTIONS = (
    AttentionCase("decode-8k", 1, 1, 8192),
    AttentionCase("decode-8k-blocks-16", 1, 1, 8192, 16),
    AttentionCase("decode-8k-blocks-256", 1, 1, 8192, 256),
    AttentionCase("decode-8k-contiguous", 1, 1, 8192, contiguous=True),
    AttentionCase("decode-8k-int8", 1, 1, 8192, dtype="int8"),
    AttentionCase("decode-8k-int8-blocks-16", 1, 1, 8192, 16, "int8"),
    AttentionCase("decode-8k-int8-blocks-256", 1, 1, 8192, 256, "int8"),
    AttentionCase("decode-8k-int8-contiguous", 1, 1, 8192, dtype="int8", contiguous=True),
    AttentionCase("verify-13-8k", 1, 13, 8192),
    AttentionCase("verify-13-8k-int8", 1, 13, 8192, dtype="int8"),
    AttentionCase("decode-32x1k", 32, 1, 1024),
    AttentionCase("decode-32x1k-int8", 32, 1, 1024, dtype="int8"),
    AttentionCase("prefill-512", 1, 512, 512),
    AttentionCase("prefill-1920", 1, 1920, 1920),
    AttentionCase("prefill-1920-int8", 1, 1920, 1920, dtype="int8"),
)


def gemm_plan(team: ops.Team, case: GemmCase, rows: int) -> tuple[ops.Plan, int]:
    """As many copies of one matrix as few rows need to come from memory; and how many those are."""
    size = case.n * case.k * 2
    n_copies = max(1, STREAM_BYTES // size) if rows <= 64 else 1
    source = np.random.Generator(np.random.PCG64(1)).standard_normal((case.n, case.k), np.float32)
    weights: dict[str, Any] = {}
    for i in range(n_copies):
        weights[f"w{i}"] = matrix = ops.PackedMatrix(team, case.n, case.k)
        matrix.pack(source, "f32")
    slots = [ir.Slot("a", case.k, "bf16", "tokens"), ir.Slot("c", case.width, case.dtype, "tokens")]
    gemms = [
        ir.Gemm(f"g{i}", "a", "c", f"w{i}", epilogue=case.epilogue, act=case.act, scale=1e-3)
        for i in range(n_copies)
    ]
    return build(team, gemms, slots, weights, max_tokens=rows), n_copies


def attention_plan(team: ops.Team, case: AttentionCase) -> tuple[ops.Plan, ir.Batch]:
    """One layer's attention over a full cache, and the step to run."""
    per_seq = -(-case.kv_len // case.block_size)
    n_blocks = per_seq * case.n_seqs
    pool = ops.KVPool(1, N_KV_HEADS, HEAD_DIM, n_blocks, case.block_size, case.dtype, case.contiguous)
    slots = [
        ir.Slot("qkv", QKV, "f32", "tokens"),
        ir.Slot("q", N_HEADS * HEAD_DIM, "bf16", "tokens"),
        ir.Slot("o", N_HEADS * HEAD_DIM, "bf16", "tokens"),
    ]
    rope = ir.RopeKV("r", "qkv", "q", N_HEADS, 0)
    attention = ir.Attention("a", "q", "o", N_HEADS, 0, HEAD_DIM**-0.5)
    sizes: dict[str, Any] = {
        "pool": pool,
        "kv": ir.KVLayer(N_KV_HEADS, HEAD_DIM),
        "max_tokens": 2048,
        "max_seqs": case.n_seqs,
    }
    fill = build(team, [rope], slots, **sizes)
    fill.slot("qkv")[...] = np.random.Generator(np.random.PCG64(2)).standard_normal((2048, QKV), np.float32)
    blocks = np.arange(n_blocks).reshape(case.n_seqs, per_seq)
    tables = (blocks[:, :1] if case.contiguous else blocks).tolist()
    for table in tables:
        for at in range(0, case.kv_len, 2048):
            fill.step(batch_of([([0] * min(2048, case.kv_len - at), at, table)]))
    plan = build(team, [rope, attention], slots, **sizes)
    plan.slot("qkv")[...] = fill.slot("qkv")
    return plan, batch_of([([0] * case.rows, case.kv_len - case.rows, table) for table in tables])


def team() -> ops.Team:
    """As many threads as an engine takes by default."""
    return ops.Team(ops.default_threads()[0])


def report(
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    team: ops.Team,
    isa: str,
    name: str,
    n_bytes: float,
    n_flops: float = 0.0,
    kind: str = "bf16",
) -> None:
    """Rates of the benchmark's median and their shares of the roofs measured now; also kept in
    `extra_info`. `kind`: of the dot products, as `ops.roof_dot` takes it.
    """
    if not benchmark.enabled:
        return
    seconds = benchmark.stats.stats.median
    read_roof = ops.roof_read(team, 1 << 29, 2)
    info = {"GB/s": n_bytes / seconds / 1e9, "share of read roof": n_bytes / seconds / read_roof}
    text = f"{info['GB/s']:8.2f} GB/s = {info['share of read roof']:6.1%} of {read_roof / 1e9:.1f}"
    if n_flops:
        dot_roof = ops.roof_dot(team, kind, isa)
        info |= {"GFLOP/s": n_flops / seconds / 1e9, "share of dot roof": n_flops / seconds / dot_roof}
        text += (
            f"   {info['GFLOP/s']:8.1f} GFLOP/s = {info['share of dot roof']:6.1%} of {dot_roof / 1e9:.0f}"
        )
    benchmark.extra_info.update({key: round(value, 4) for key, value in info.items()})
    with capsys.disabled():
        print(f"\n{isa:10} {name:28} {seconds * 1e6:10.1f} us  {text}", end="")
