"""What one step of a plan must read and compute at least: the denominators of every share of a roof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pace.models.plan import Attention, Embed, Gemm, Plan

__all__ = ["Cost", "step_cost"]

BF16_BYTES = 2


@dataclass(frozen=True)
class Cost:
    """Lower bounds of a step.

    Attributes:
        n_bytes: weights and cached keys and values that are read.
        n_flops: 2 x the matrix parameters that each row passes, and causal attention.
    """

    n_bytes: float
    n_flops: float


def step_cost(plan: Plan, q_len: Sequence[int], kv_len: Sequence[int], n_logit_rows: int) -> Cost:
    """Count a step.

    Args:
        q_len: rows of each sequence.
        kv_len: length of each sequence, these rows included.
        n_logit_rows: rows that need logits; the LM head, and whatever follows the last attention, runs on
            these only.
    """
    rows = {"tokens": sum(q_len), "logits": n_logit_rows}
    n_bytes = n_flops = 0.0
    for op in plan.ops:
        if isinstance(op, Gemm):
            src, dst = plan.slots[op.src], plan.slots[op.dst]
            n_params = src.width * dst.width * (2 if op.epilogue == "gated" else 1)
            n_flops += 2.0 * n_params * rows[src.rows]
            n_bytes += n_params * BF16_BYTES if rows[src.rows] else 0
        elif isinstance(op, Embed):
            n_bytes += rows["tokens"] * plan.slots[op.dst].width * BF16_BYTES
        elif isinstance(op, Attention):
            for q, kv in zip(q_len, kv_len, strict=True):
                seen = sum(min(p + 1, op.window or p + 1) for p in range(kv - q, kv))  # keys over all rows
                read = min(kv, (op.window or kv) + q - 1)
                n_flops += 4.0 * plan.n_heads * plan.head_dim * seen
                n_bytes += 2 * plan.n_kv_heads * plan.head_dim * BF16_BYTES * read
    return Cost(n_bytes, n_flops)
