"""RoPE with the KV append, and attention over the cache, on every tier.

K and V live in a pool that Python cannot see; what was appended shows in what attention returns.

Tolerance of attention, with p the exact weights, A = sum p |v| and o the output: P is rounded to bf16
before it meets V and the same rounding may or may not be in the sum, 2 * 2^-8 A; a score is off by at
most e = (d + 4) 2^-24 scale sum |q||k| (and 2^-20 cap with a soft cap), which changes a weight by 2 e
relative; f32 sums over kv_len columns, (kv_len + 64) 2^-24 A; bf16 output, 2^-8 |o|.

V is a spike per position plus noise, so that one position too many or too few moves some channel by several
times the tolerance.

int8: the oracle quantises as the format says, in float32, so its integers and scales are the cache's own bits; a
weight is rounded once more when it takes the value's scale, 2^-8 A, and a score takes two more roundings.
"""

from __future__ import annotations

import mmap
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ext.kit import (
    F64,
    U_BF16,
    U_F32,
    assert_close,
    bf16,
    build,
    chosen,
    memory,
    poison,
    rng,
    take,
)
from golden.harness import batch_of

from pace import ops
from pace.errors import ConfigError
from pace.models import plan as ir
from pace.reference import norm, rotate, visible_to


@dataclass(frozen=True)
class Shape:
    """Heads and cache geometry of one test."""

    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 32
    n_blocks: int = 48
    dtype: str = "bf16"
    contiguous: bool = False

    @property
    def group(self) -> int:
        return self.n_heads // self.n_kv_heads

    @property
    def q_width(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def pool(self) -> ops.KVPool:
        return ops.KVPool(
            1,
            self.n_kv_heads,
            self.head_dim,
            self.n_blocks,
            self.block_size,
            self.dtype,
            self.contiguous,
        )

    def tables(self, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        """Scattered, disjoint blocks for sequences of these lengths; contiguous: the first of each extent."""
        sizes = [-(-n // self.block_size) for n in lengths]
        if not self.contiguous:
            free = rng("blocks", seed).permutation(self.n_blocks).tolist()
            return [[free.pop() for _ in range(size)] for size in sizes]
        first, tables = self.n_blocks, [[0]] * len(sizes)
        for i in rng("extents", seed).permutation(len(sizes)):  # from the pool's end on, in any order
            first -= sizes[i]
            tables[i] = [first]
        return tables

    def table(self, blocks: Sequence[int]) -> list[int]:
        """The table of consecutive blocks."""
        return [blocks[0]] if self.contiguous else list(blocks)

    def stored(self, x: F64) -> F64:
        """K or V [n, G, D] as the cache holds it, from exact bf16 values."""
        if self.dtype == "bf16":
            return x
        values = x.astype(np.float32)
        scale = np.abs(values).max(-1, keepdims=True) / np.float32(127)
        integers = np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0))
        assert np.abs(integers).max() <= 127
        return integers.astype(np.float64) * scale.astype(np.float64)


def plan_of(
    team: ops.Team,
    shape: Shape,
    pool: ops.KVPool,
    kernel: str,
    attention: ir.Attention | None,
    rope: ir.RopeKV | None = None,
    ropes: tuple[ir.Rope, ...] = (),
    weights: dict[str, np.ndarray] | None = None,
    max_tokens: int = 608,
) -> ops.Plan:
    """RopeKV (without rotation unless given), then attention if given."""
    slots = [
        ir.Slot("qkv", shape.qkv_width, "f32", "tokens"),
        ir.Slot("q", shape.q_width, "bf16", "tokens"),
        ir.Slot("o", shape.q_width, "bf16", "tokens"),
    ]
    operators: list[ir.Op] = [rope or ir.RopeKV("r", "qkv", "q", shape.n_heads, 0)]
    if attention is not None:
        operators.append(attention)
    return build(
        team,
        operators,
        slots,
        weights,
        kernels=chosen(kernel),
        pool=pool,
        kv=ir.KVLayer(shape.n_kv_heads, shape.head_dim),
        max_tokens=max_tokens,
        ropes=ropes,
    )


Parts = Sequence[tuple[F64, int, list[int]]]
"""Per sequence: q|k|v rows [n, qkv_width], tokens already cached, block table."""


def step(plan: ops.Plan, parts: Parts) -> None:
    """One step with the given rows as the input of RopeKV; q and o poisoned before."""
    rows = np.concatenate([rows for rows, _, _ in parts])
    whole = memory(plan, "qkv")
    whole[...] = np.nan
    whole[: len(rows), : rows.shape[1]] = rows
    poison(plan, "q", "o")
    plan.step(batch_of([([0] * len(rows), cached, table) for rows, cached, table in parts]))


def make_rows(shape: Shape, n: int, *key: object) -> F64:
    """q|k|v of n tokens, bf16 values: peaked scores, spikes in v."""
    r = rng("rows", n, *key)
    qkv = r.standard_normal((n, shape.qkv_width))
    v = qkv[:, -shape.n_kv_heads * shape.head_dim :].reshape(n, shape.n_kv_heads, shape.head_dim)
    v *= 0.03
    v[np.arange(n), :, np.arange(n) % shape.head_dim] += 2.0
    return bf16(qkv)


def split(shape: Shape, qkv: F64) -> tuple[F64, F64, F64]:
    """[n, H, D], [n, G, D], [n, G, D]."""
    heads = qkv.reshape(len(qkv), -1, shape.head_dim)
    return tuple(np.split(heads, [shape.n_heads, shape.n_heads + shape.n_kv_heads], axis=1))  # type: ignore[return-value]  # three of them


def attend(
    shape: Shape,
    q: F64,
    k: F64,
    v: F64,
    op: ir.Attention,
    sinks: np.ndarray | None,
) -> tuple[F64, F64]:
    """The last len(q) rows of one sequence in float64: output [n, H * D] and the tolerance of each
    element. k, v: as the cache holds them.
    """
    n, length = len(q), len(k)
    out, tolerance = np.empty_like(q), np.empty_like(q)
    visible = visible_to(np.arange(length - n, length, dtype=np.int32), length, op.window, op.chunk)
    for h in range(shape.n_heads):
        kh, vh = k[:, h // shape.group], v[:, h // shape.group]
        s = op.scale * q[:, h] @ kh.T
        error = (shape.head_dim + 6) * U_F32 * abs(op.scale) * (np.abs(q[:, h]) @ np.abs(kh).T)
        if op.softcap is not None:
            s, error = op.softcap * np.tanh(s / op.softcap), error + 2.0**-20 * op.softcap
        s = np.where(visible, s, -np.inf)
        top = s.max(-1, keepdims=True)
        if sinks is not None:
            top = np.maximum(top, float(sinks[h]))
        p = np.exp(s - top)
        total = p.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(float(sinks[h]) - top))
        p /= total
        out[:, h] = p @ vh
        size = p @ np.abs(vh)
        score_error = np.where(visible, error, 0).max(-1, keepdims=True)
        relative = (2 if shape.dtype == "bf16" else 3) * U_BF16 + 2 * score_error + (length + 64) * U_F32
        tolerance[:, h] = relative * size + U_BF16 * np.abs(out[:, h])
    return out.reshape(n, -1), tolerance.reshape(n, -1)


def check(
    kernel: str,
    team: ops.Team,
    shape: Shape,
    sequences: Sequence[tuple[int, int]],
    window: int | None = None,
    softcap: float | None = None,
    sinks: Sequence[float] | None = None,
    scale: float | None = None,
    chunk: int | None = None,
) -> None:
    """Sequences of (kv_len, rows of the checked step): cache all but those rows, then one step over all."""
    pool = shape.pool()
    op = ir.Attention(
        "a",
        "q",
        "o",
        shape.n_heads,
        0,
        scale or shape.head_dim**-0.5,
        window,
        chunk,
        softcap=softcap,
        sinks=None if sinks is None else "s",
    )
    weights = None if sinks is None else {"s": np.resize(np.asarray(sinks, np.float32), shape.n_heads)}
    fill = plan_of(team, shape, pool, kernel, None)
    plan = plan_of(team, shape, pool, kernel, op, weights=weights)
    # Whatever was in the pool before must not matter: make it NaN, keys and values of every block.
    for block in range(0, shape.n_blocks * shape.block_size, 512):
        blocks = list(
            range(block // shape.block_size, min((block + 512) // shape.block_size, shape.n_blocks))
        )
        stale = np.full((len(blocks) * shape.block_size, shape.qkv_width), np.nan)
        step(fill, [(stale, 0, shape.table(blocks))])
    rows = [make_rows(shape, length, i) for i, (length, _) in enumerate(sequences)]
    tables = shape.tables([length for length, _ in sequences])
    for qkv, table, (length, n) in zip(rows, tables, sequences, strict=True):
        if length > n:
            step(fill, [(qkv[: length - n], 0, table)])
    step(
        plan, [(q[len(q) - n :], len(q) - n, t) for q, t, (_, n) in zip(rows, tables, sequences, strict=True)]
    )
    got = take(plan, "o", sum(n for _, n in sequences))
    at = 0
    for qkv, (_, n) in zip(rows, sequences, strict=True):
        q, k, v = split(shape, qkv)
        k, v = shape.stored(k), shape.stored(v)
        want, tolerance = attend(shape, q[-n:], k, v, op, weights and weights["s"])
        assert_close(got[at : at + n], want, tolerance)
        at += n


# Every head_dim at a ratio of 3, every ratio at 64, and the corners.
HEADS = [(6, 2, dim) for dim in (16, 32, 48, 64, 80, 96, 128, 256, 272, 512)]
HEADS += [(heads, kv_heads, 64) for heads, kv_heads in ((1, 1), (4, 4), (8, 2), (8, 1), (12, 1))]
HEADS += [(4, 4, 16), (8, 1, 256), (8, 1, 80), (8, 1, 512)]


DTYPES = ops.KV_DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), HEADS)
def test_heads(kernel: str, team: ops.Team, n_heads: int, n_kv_heads: int, head_dim: int, dtype: str) -> None:
    shape = Shape(n_heads, n_kv_heads, head_dim, n_blocks=8, dtype=dtype)
    check(kernel, team, shape, [(65, 1), (40, 13), (17, 17)])


LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 600]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(kernel: str, team: ops.Team, length: int, block_size: int, dtype: str) -> None:
    shape = Shape(4, 2, 32, block_size, n_blocks=-(-600 // block_size) + 2, dtype=dtype)
    check(kernel, team, shape, [(length, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 13, 16, 17, 33, 70, 300])
def test_rows(kernel: str, team: ops.Team, rows: int, dtype: str) -> None:
    """Verification and prefill: tiles of 64 rows that end anywhere."""
    if kernel == "reference" and rows > 100:
        pytest.skip("the scalar kernel takes seconds here; shorter prefills cover it")
    check(kernel, team, Shape(6, 2, 32, 32, dtype=dtype), [(300, rows)])


@pytest.mark.parametrize("window", [1, 2, 16, 31, 33, 255, 256, 257, 1000])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_window(kernel: str, team: ops.Team, window: int, block_size: int, dtype: str) -> None:
    shape = Shape(4, 2, 32, block_size, n_blocks=960 // block_size, dtype=dtype)
    check(kernel, team, shape, [(530, 3), (40, 40), (257, 1)], window=window)


@pytest.mark.parametrize("chunk", [1, 31, 32, 100, 256, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk(kernel: str, team: ops.Team, chunk: int, dtype: str) -> None:
    """Chunks that end anywhere, in a row of tiles, under a window as well."""
    shape = Shape(4, 2, 32, 16, n_blocks=60, dtype=dtype)
    check(kernel, team, shape, [(530, 3), (40, 40), (257, 1)], chunk=chunk)
    check(kernel, team, shape, [(301, 70)], chunk=chunk, window=40, softcap=20.0, sinks=[0.5])


@pytest.mark.parametrize("sinks", [[0.0], [-5.0, 3.0], [60.0], [-1000.0], [4.0, 0.0, -3.0, 1.0]])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(kernel: str, team: ops.Team, sinks: list[float], window: int | None, dtype: str) -> None:
    """A sink of 0 counts as well; a large one takes nearly all the weight, a very negative one none."""
    check(kernel, team, Shape(4, 2, 32, dtype=dtype), [(300, 2), (33, 33)], window=window, sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [1.0, 30.0, 50.0])
def test_softcap(kernel: str, team: ops.Team, softcap: float, dtype: str) -> None:
    shape = Shape(4, 2, 64, dtype=dtype)
    check(kernel, team, shape, [(300, 2), (33, 33)], softcap=softcap, scale=1.0)
    check(kernel, team, shape, [(64, 4)], softcap=softcap, scale=1.0, window=20, sinks=[0.5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(kernel: str, team: ops.Team, dtype: str) -> None:
    """Scores of several hundred: only the best position counts, nothing overflows. The products reach
    2^-24 * 64 * 10^3, so the tolerance above still tells one position from another."""
    check(kernel, team, Shape(2, 1, 64, dtype=dtype), [(290, 5)], scale=4.0)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_of_many(kernel: str, team: ops.Team, dtype: str, block_size: int, contiguous: bool) -> None:
    """Eight sequences of every kind in one step."""
    shape = Shape(8, 2, 32, block_size, n_blocks=1440 // block_size, dtype=dtype, contiguous=contiguous)
    check(kernel, team, shape, [(1, 1), (33, 1), (256, 1), (31, 31), (300, 13), (16, 16), (17, 2), (257, 64)])


# ---- bits -------------------------------------------------------------------------------------------------


def last_rows(
    kernel: str, team: ops.Team, shape: Shape, op: ir.Attention, qkv: F64, cuts: Sequence[int], seed: int = 0
) -> bytes:
    """Output bits of all rows of one sequence that is fed in pieces ending at `cuts`."""
    weights = {"s": np.linspace(-1, 1, shape.n_heads).astype(np.float32)}
    plan = plan_of(team, shape, shape.pool(), kernel, op, weights=weights)
    (table,) = shape.tables([len(qkv)], seed)
    out = []
    for begin, end in pairwise([0, *cuts]):
        step(plan, [(qkv[begin:end], begin, table)])
        out.append(take(plan, "o", end - begin))
    return np.concatenate(out).tobytes()


@pytest.mark.parametrize(
    ("window", "softcap", "chunk"),
    [(None, None, None), (70, None, None), (257, 20.0, None), (None, None, 90)],
)
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"), [(8, 1, 64), (3, 3, 80), (4, 2, 32), (2, 1, 512)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_cut(
    isa: str,
    team: ops.Team,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    chunk: int | None,
    dtype: str,
) -> None:
    """Chunks, single rows, block sizes, block tables and extents: the same bytes, over more than one piece of
    256.
    """
    shape = Shape(n_heads, n_kv_heads, head_dim, 32, n_blocks=40, dtype=dtype)
    n = 300
    qkv = make_rows(shape, n)
    op = ir.Attention("a", "q", "o", shape.n_heads, 0, 0.2, window, chunk, softcap=softcap, sinks="s")
    whole = last_rows(isa, team, shape, op, qkv, [n])
    assert whole == last_rows(isa, team, shape, op, qkv, [1, 14, 33, 100, 113, 240, 280, 299, n], seed=1)
    assert whole == last_rows(isa, team, shape, op, qkv, [250, *range(251, n + 1)], seed=2)
    for block_size in (16, 64, 256):
        other = replace(shape, block_size=block_size, contiguous=block_size == 64)
        assert whole == last_rows(isa, team, other, op, qkv, [128, 255, 256, n], seed=3)


# ---- stale memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_leak_from_reused_blocks(kernel: str, team: ops.Team, block_size: int, dtype: str) -> None:
    """The same sequence over a clean pool, over another's blocks, and over blocks of NaN and infinities, one
    token at a time: the same bytes."""
    shape = Shape(4, 2, 32, block_size, n_blocks=6, dtype=dtype)
    n = 70 if block_size < 64 else 40
    qkv = make_rows(shape, n)
    op = ir.Attention("a", "q", "o", shape.n_heads, 0, 0.2)
    outputs = []
    for stale in (None, 1e30, np.nan, np.inf):
        pool = shape.pool()
        plan = plan_of(team, shape, pool, kernel, op)
        n_old = min(512, shape.n_blocks * block_size)
        table = list(range(n_old // block_size))
        if stale is not None:
            step(
                plan_of(team, shape, pool, kernel, None),
                [(np.full((n_old, shape.qkv_width), stale), 0, table)],
            )
        rows = []
        for i in range(n):
            step(plan, [(qkv[i : i + 1], i, table)])
            rows.append(take(plan, "o", 1))
        assert np.isfinite(np.concatenate(rows)).all()
        outputs.append(np.concatenate(rows).tobytes())
    assert len(set(outputs)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_neighbour_with_nan_changes_nothing(kernel: str, team: ops.Team, dtype: str) -> None:
    shape = Shape(4, 2, 32, 16, dtype=dtype)
    a, b = make_rows(shape, 40, "a"), make_rows(shape, 50, "b")
    op = ir.Attention("a", "q", "o", shape.n_heads, 0, 0.2)
    ta, tb = shape.tables([40, 50])
    outputs = []
    for neighbour in (b, np.full_like(b, np.nan)):
        plan = plan_of(team, shape, shape.pool(), kernel, op)
        step(plan, [(neighbour, 0, tb), (a, 0, ta)])
        outputs.append(take(plan, "o", 90)[50:].tobytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_seen(kernel: str, team: ops.Team, dtype: str, where: str) -> None:
    """One NaN in one key or value: every later row of its kv head has a NaN, and only those rows. In int8 an
    infinity is one too, for it leaves nothing of the head's other elements."""
    shape = Shape(4, 2, 32, 16, dtype=dtype)
    at = (4 if where == "key" else 6) * 32 + 5  # of kv head 0
    for number in (np.nan,) if dtype == "bf16" else (np.nan, np.inf, -np.inf):
        qkv = make_rows(shape, 40)
        qkv[33, at] = number
        plan = plan_of(team, shape, shape.pool(), kernel, ir.Attention("a", "q", "o", shape.n_heads, 0, 0.2))
        (table,) = shape.tables([40])
        rows = []
        for i in range(40):
            step(plan, [(qkv[i : i + 1], i, table)])
            rows.append(take(plan, "o", 1))
        bad = (
            np.isnan(np.concatenate(rows)).reshape(40, 2, 2, 32).any(-1)
        )  # [rows, kv head, query head of it]
        assert not bad[:33].any() and bad[33:, 0].all() and not bad[:, 1].any()


# ---- copying blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy(team: ops.Team, dtype: str, block_size: int, n_tokens: int) -> None:
    """A full block of NaN takes over a prefix of a full block of another sequence, which then goes on with other
    tokens: the bytes of a sequence that never was anywhere else. The source keeps its own."""
    n_tokens = min(n_tokens, block_size)
    shape = Shape(4, 2, 32, block_size, n_blocks=5, dtype=dtype)
    pool = ops.KVPool(2, 2, 32, 5, block_size, dtype)
    plans = []
    for layer in (0, 1):
        op = ir.Attention("a", "q", "o", shape.n_heads, layer, 0.2)
        plans.append(plan_of(team, shape, pool, "", op, ir.RopeKV("r", "qkv", "q", shape.n_heads, layer)))
    source = make_rows(shape, block_size, "source")
    own = np.concatenate([source[:n_tokens], make_rows(shape, 40, "own")])

    def run(plan: ops.Plan, rows: F64, cached: int, table: list[int]) -> bytes:
        step(plan, [(rows[cached:], cached, table)])
        return take(plan, "o", len(rows) - cached).tobytes()

    fresh = plan_of(team, shape, shape.pool(), "", ir.Attention("a", "q", "o", shape.n_heads, 0, 0.2))
    want = run(fresh, own, 0, [0, 1, 2, 3])
    row = len(want) // len(own)
    for plan in plans:
        run(plan, np.full((5 * block_size, shape.qkv_width), np.nan), 0, [0, 1, 2, 3, 4])
        want_source = run(plan, source, 0, [3])
    pool.copy(3, 1, n_tokens)
    for plan in plans:
        assert run(plan, own, n_tokens, [1, 0, 2, 4]) == want[n_tokens * row :]
        assert run(plan, source, block_size - 1, [3]) == want_source[-row:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0, 1), "copy of block 4 to 0"),
        ((-1, 0, 1), "copy of block -1 to 0"),
        ((0, 4, 1), "copy of block 0 to 4"),
        ((0, -1, 1), "copy of block 0 to -1"),
        ((2, 2, 1), "expected two different blocks of 4"),
        ((0, 1, -1), "copy of -1 tokens"),
        ((0, 1, 17), "copy of 17 tokens, expected 0 to 16"),
    ],
)
def test_copy_refuses(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.KVPool(1, 1, 16, 4, 16).copy(*arguments)


@pytest.mark.parametrize(
    ("table", "n", "message"),
    [
        ([0, 1], 20, "tables of 1 column, the first block, got 2"),
        ([3], 20, "sequence 0 needs 2 blocks from 3 on, there are 4"),
        ([4], 1, "sequence 0 needs 1 blocks from 4 on"),
        ([-1], 1, "sequence 0 needs 1 blocks from -1 on"),
        ([0], 65, "sequence 0 needs 5 blocks from 0 on"),
    ],
)
def test_contiguous_refuses(team: ops.Team, table: list[int], n: int, message: str) -> None:
    shape = Shape(block_size=16, n_blocks=4, contiguous=True)
    plan = plan_of(team, shape, shape.pool(), "", None)
    with pytest.raises(ValueError, match=message):
        step(plan, [(make_rows(shape, n), 0, table)])


# ---- RoPE and append --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 24, 4, 16), "head_dim is 24"),
        ((1, 1, 528, 4, 16), "head_dim is 528"),
        ((1, 1, 64, 4, 24), "block_size is 24"),
        ((1, 1, 64, 4, 8), "block_size is 8"),
        ((1, 0, 64, 4, 16), "must be positive"),
        ((1, 1, 64, 0, 16), "must be positive"),
        ((1, 1, 64, 4, 16, "fp8"), "KV cache dtype is 'fp8', expected bf16 or int8"),
    ],
)
def test_pool_refuses(sizes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ops.KVPool(*sizes)


def test_pool_size() -> None:
    assert ops.KVPool(3, 2, 48, 5, 32).nbytes == 3 * 2 * 5 * 32 * 2 * 48 * 2
    assert ops.KVPool(3, 2, 48, 5, 32, "int8").nbytes == 3 * 2 * 5 * 32 * (2 * 48 + 8)
    with pytest.raises(MemoryError):
        ops.KVPool(1 << 20, 1 << 20, 256, 1 << 20, 1 << 20)


@pytest.mark.parametrize("contiguous", [False, True])
def test_pool_maps_ahead(team: ops.Team, contiguous: bool) -> None:
    """One more block per step than is used, up to one per sequence, never beyond the pool; their memory is there."""
    block = 16
    pool = ops.KVPool(256, 1, 128, 6, block, contiguous=contiguous)  # 2 MiB a block
    shape = Shape(1, 1, 128, block, n_blocks=6, contiguous=contiguous)
    plan = plan_of(team, shape, pool, "", ir.Attention("a", "q", "o", shape.n_heads, 0, 0.2))
    rows = make_rows(shape, 40, "ahead")

    def after(*tables: list[int], n: int = 1) -> int:
        step(plan, [(rows[:n], 0, table[:1] if contiguous else table) for table in tables])
        return pool.n_mapped

    assert pool.n_mapped == 0
    before = resident_bytes()
    assert after([0], [1]) == 3
    assert after([0], [1]) == 4
    if tuple(map(int, platform.release().split(".")[:2])) >= (5, 14):
        assert resident_bytes() - before > 3 << 20  # of blocks 2 and 3, which nobody has used
    assert after([0], [1]) == 4
    assert after([2, 3, 4], n=40) == 6
    assert after([5]) == 6


def resident_bytes() -> int:
    """What the process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
