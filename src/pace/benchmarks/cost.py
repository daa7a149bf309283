"""What the operators of a step must read and compute at least: the denominators of every share of a roof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pace.models.plan import (
    Attention,
    Embed,
    ExpertsIn,
    ExpertsOut,
    Gemm,
    KVLayer,
    Norm,
    Op,
    Permute,
    Plan,
    RopeKV,
    Select,
    Slot,
    WeightShape,
)
from pace.models.weight_formats import bits_of

__all__ = ["Cost", "op_costs", "op_kind", "rowwise_bytes", "step_cost"]

DTYPE_BYTES = {"bf16": 2, "f32": 4}

KINDS = {"attn": "attention", "rope": "rope+kv", "angles": "rope+kv", "lm_head": "lm head"}
"""Of operator names that do not say by themselves what they are to be called."""


@dataclass(frozen=True)
class Cost:
    """Lower bounds of a step, or of an operator in it.

    Attributes:
        n_bytes: weights and cached keys and values that are read.
        n_flops: 2 x the matrix parameters that each row passes, and causal attention.
        n_int8: of these, the operations of matrices that meet int8 rows.
    """

    n_bytes: float = 0.0
    n_flops: float = 0.0
    n_int8: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.n_bytes + other.n_bytes, self.n_flops + other.n_flops, self.n_int8 + other.n_int8)

    def __truediv__(self, n: float) -> Cost:
        return Cost(self.n_bytes / n, self.n_flops / n, self.n_int8 / n)


def step_cost(
    plan: Plan,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    n_logit_rows: int,
    kv_cache_dtype: str = "bf16",
    experts: Mapping[str, float] | None = None,
) -> Cost:
    """Count a step.

    Args:
        q_len: rows of each sequence.
        kv_len: length of each sequence, these rows included.
        n_logit_rows: rows that need logits; the LM head, and whatever follows the last attention, runs on
            these only.
        kv_cache_dtype: "bf16" or "int8".
        experts: how many the rows chose, by operator (`ops.Plan.op_experts`); where an operator is not named, as many as
            there are if no two rows chose the same.
    """
    costs = op_costs(plan, q_len, kv_len, n_logit_rows, kv_cache_dtype, experts)
    return sum((cost for _, cost in costs), Cost())


def op_costs(
    plan: Plan,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    n_logit_rows: int,
    kv_cache_dtype: str = "bf16",
    experts: Mapping[str, float] | None = None,
) -> Iterator[tuple[Op, Cost]]:
    """Count the operators of a step one by one; arguments as `step_cost`.

    Attention costs the same in every layer of one shape and is counted once for all of them: a step of 32 sequences
    has hundreds of lengths to go through.
    """
    experts = experts or {}
    seen: dict[tuple[int | None, int, KVLayer, str], Cost] = {}
    for op in plan.ops:
        if isinstance(op, Attention):
            shape = op.window, op.n_heads, plan.kv[op.kv], plan.slots[op.src].rows
            if shape not in seen:
                seen[shape] = _op_cost(plan, op, q_len, kv_len, n_logit_rows, kv_cache_dtype)
            yield op, seen[shape]
        else:
            yield (
                op,
                _op_cost(plan, op, q_len, kv_len, n_logit_rows, kv_cache_dtype, experts.get(op.name)),
            )


def _op_cost(
    plan: Plan,
    op: Op,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    n_logit_rows: int,
    kv_cache_dtype: str = "bf16",
    experts: float | None = None,
) -> Cost:
    """Count one operator of a step; arguments as `step_cost`. Row-wise operators cost nothing here."""
    n_rows = {"tokens": sum(q_len), "logits": n_logit_rows}
    if isinstance(op, Gemm):
        src, dst = plan.slots[op.src], plan.slots[op.dst]
        n_params = src.width * dst.width * (2 if op.epilogue == "gated" else 1)
        rows = n_rows[src.rows]
        return _product(_weight_bytes(plan, op, n_params) if rows else 0.0, 2.0 * n_params * rows, src)
    if isinstance(op, ExpertsIn | ExpertsOut):
        src, dst, top_k = plan.slots[op.src], plan.slots[op.dst], plan.slots[op.route].width // 2
        n_params = 2 * src.width * op.width if isinstance(op, ExpertsIn) else src.width * dst.width
        choices = n_rows[src.rows] * top_k
        read = min(op.count, choices) if experts is None else experts
        return _product(read * _weight_bytes(plan, op, n_params), 2.0 * n_params * choices, src)
    if isinstance(op, Embed):
        return Cost(float(n_rows["tokens"] * plan.slots[op.dst].width * DTYPE_BYTES["bf16"]))
    if isinstance(op, Attention):
        n_pairs = n_read = 0
        if (
            plan.slots[op.src].rows == "logits"
        ):  # behind the last layer that appends: as many rows of each sequence
            q_len = [min(q, n_logit_rows // len(q_len)) for q in q_len]
        for q, kv in zip(q_len, kv_len, strict=True):
            window = op.window or kv
            full = max(0, kv - max(kv - q, window))  # rows that see a whole window; the others see all
            n_pairs += full * window + _sum_to(kv - full) - _sum_to(kv - q)
            n_read += min(kv, window + q - 1)
        row_bytes = _kv_token_bytes(plan.kv[op.kv], kv_cache_dtype)
        return Cost(float(n_read * row_bytes), 4.0 * op.n_heads * plan.kv[op.kv].head_dim * n_pairs)
    return Cost()


def _product(n_bytes: float, n_flops: float, src: Slot) -> Cost:
    """Of a matrix, by the rows that it meets."""
    return Cost(n_bytes, n_flops, n_flops if src.dtype == "int8" else 0.0)


def rowwise_bytes(plan: Plan, op: Op, n_tokens: int, n_logit_rows: int, kv_cache_dtype: str = "bf16") -> int:
    """Bytes that a row-wise operator (norm, rotation, selection, another order) reads and writes; 0 for all others.

    They come from the caches, so that a rate made of them says how well a kernel does, not what it costs the
    memory bus.
    """
    if not isinstance(op, (Norm, RopeKV, Select, Permute)):
        return 0
    src, dst = plan.slots[op.src], plan.slots[op.dst]
    rows = n_tokens if dst.rows == "tokens" else n_logit_rows
    row_bytes = src.width * DTYPE_BYTES[src.dtype] + dst.width * DTYPE_BYTES[dst.dtype]
    if isinstance(op, RopeKV):
        row_bytes += _kv_token_bytes(plan.kv[op.kv], kv_cache_dtype) if op.append else 0
    return rows * row_bytes


def op_kind(name: str) -> str:
    """What an operator is called in a table: "layers.3.attn_norm" is a norm."""
    parts = name.split(".")
    last = parts[0] if parts[0] in ("select", "angles") else parts[-1]
    return "norm" if last.endswith("norm") else KINDS.get(last, last)


def _weight_bytes(plan: Plan, op: Gemm | ExpertsIn | ExpertsOut, n_params: int) -> float:
    """Of so many of an operator's weights, in the format that they have in memory."""
    (shape,) = (s for field, s in op.needs(plan) if field == "weight" and isinstance(s, WeightShape))
    return n_params * bits_of(shape.format) / 8


def _kv_token_bytes(layer: KVLayer, kv_cache_dtype: str) -> int:
    """Keys and values of one token in one layer; int8 adds an f32 scale for each of K and V per head."""
    per_head = 2 * layer.head_dim + 8 if kv_cache_dtype == "int8" else 4 * layer.head_dim
    return layer.n_kv_heads * per_head


def _sum_to(n: int) -> int:
    """1 + 2 + … + n."""
    return n * (n + 1) // 2
