"""RoPE with the KV append on every tier: queries, keys and values as they reach attention."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from ext.kit import U_BF16, U_F32, assert_close, bf16, rng, take
from ext.test_attention import DTYPES, Shape, attend, make_rows, plan_of, split, step

from pace import ops
from pace.models import plan as ir
from pace.reference import norm, rotate


def frequencies(rotary_dim: int) -> np.ndarray:
    return (10000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)


ROPES = {
    "none": None,
    "halves": ir.Rope(frequencies(64), 1.0, False, 64),
    "partial": ir.Rope(frequencies(24), 1.0, False, 24),
    "neighbours": ir.Rope(frequencies(64), 1.0, True, 64),
    "partial-neighbours": ir.Rope(frequencies(20), 1.0, True, 20),
    "factor": ir.Rope(frequencies(32), 1.3465736, False, 32),
}


@pytest.mark.parametrize("head_norm", [None, "rms", "rms1"])
@pytest.mark.parametrize("variant", list(ROPES))
def test_rope(kernel: str, team: ops.Team, variant: str, head_norm: ir.NormKind | None) -> None:
    """q against float64, far into a sequence too: the angle's product is f32 on both sides (as transformers
    computes it), sine and cosine are good to 2^-23, then three f32 roundings and the bf16 store."""
    shape = Shape(6, 2, 64, 256, n_blocks=40)
    table = ROPES[variant]
    r = rng(variant)
    weights = {name: r.standard_normal(64).astype(np.float32) for name in ("qn", "kn")}
    rope = ir.RopeKV("r", "qkv", "q", shape.n_heads, 0, None if table is None else 0)
    if head_norm is not None:
        rope = replace(rope, qk_norm=head_norm, q_norm="qn", k_norm="kn", norm_eps=1e-5)
    plan = plan_of(
        team,
        shape,
        shape.pool(),
        kernel,
        None,
        rope,
        () if table is None else (table,),
        weights,
        max_tokens=64,
    )
    blocks = list(range(40))
    for cached, n in ((0, 45), (31, 1), (9000, 40)):
        qkv = r.standard_normal((n, shape.qkv_width)).astype(np.float32)
        step(plan, [(qkv.astype(np.float64), cached, blocks)])
        q, _, _ = split(shape, qkv.astype(np.float64))
        if head_norm is not None:
            q = norm(q, weights["qn"].astype(np.float64), None, head_norm, 1e-5)
        size = np.abs(q)
        if table is not None:
            positions = np.arange(cached, cached + n, dtype=np.int32)
            size = size + np.abs(rotate(q, positions, table)) + np.abs(q).max(-1, keepdims=True)
            q = rotate(q, positions, table)
        tolerance = (16 if head_norm else 8) * U_F32 * size + U_BF16 * np.abs(q)
        assert_close(take(plan, "q", n), q.reshape(n, -1), tolerance.reshape(n, -1))


@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("variant", list(ROPES))
def test_keys_are_appended_as_queries_are_kept(
    kernel: str, team: ops.Team, variant: str, block_size: int
) -> None:
    """Keys cannot be read, queries can. With the same input and the same norm for both, K in the cache
    must be the bits of q, through chunks and a scattered table; attention over it then meets the usual
    tolerance.
    """
    shape = Shape(2, 2, 64, block_size, n_blocks=12)
    table = ROPES[variant]
    weights = {"n": rng("n").standard_normal(64).astype(np.float32)}
    rope = ir.RopeKV(
        "r",
        "qkv",
        "q",
        shape.n_heads,
        0,
        None if table is None else 0,
        qk_norm="rms",
        q_norm="n",
        k_norm="n",
        norm_eps=1e-6,
    )
    op = ir.Attention("a", "q", "o", shape.n_heads, 0, 0.3)
    plan = plan_of(team, shape, shape.pool(), kernel, op, rope, () if table is None else (table,), weights)
    rows = make_rows(shape, 77)
    rows[:, 128:256] = rows[:, :128]
    (blocks,) = shape.tables([77])
    kept = []
    for begin, end in pairwise([0, 5, 32, 49, 50, 77]):
        step(plan, [(rows[begin:end], begin, blocks)])
        kept.append(take(plan, "q", end - begin))
    k = np.concatenate(kept).reshape(77, 2, 64)
    want, tolerance = attend(shape, k[50:], k, split(shape, rows)[2], op, None)
    assert_close(take(plan, "o", 27), want, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_values_are_appended_exactly(kernel: str, team: ops.Team, block_size: int, dtype: str) -> None:
    """A window of 1 returns the row's own value: bf16(v), bit for bit; in int8, where 1 times the value's scale is
    the weight, bf16(integer * bf16(scale))."""
    shape = Shape(3, 3, 48, block_size, n_blocks=20, dtype=dtype)
    plan = plan_of(
        team, shape, shape.pool(), kernel, ir.Attention("a", "q", "o", shape.n_heads, 0, 1.0, window=1)
    )
    rows = rng("v").standard_normal((130, shape.qkv_width))
    (blocks,) = shape.tables([130])
    for begin, end in pairwise([0, 1, 2, 33, 64, 130]):
        step(plan, [(rows[begin:end], begin, blocks)])
        v = split(shape, rows[begin:end])[2].astype(np.float32)
        if dtype == "int8":
            scale = np.abs(v).max(-1, keepdims=True) / np.float32(127)
            # The scalar kernel rounds nothing on the way.
            v = np.rint(v / scale) * (scale.astype(np.float64) if kernel == "reference" else bf16(scale))
        assert np.array_equal(take(plan, "o", end - begin), bf16(v).reshape(end - begin, -1))
