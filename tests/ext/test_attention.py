"""Attention over the cache, on every tier.

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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
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
from pace.models import plan as ir
from pace.reference import visible_to


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
        scale: npt.NDArray[np.float32] = np.abs(values).max(-1, keepdims=True) / np.float32(127)
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
        want, tolerance = attend(shape, q[-n:], k, v, op, None if weights is None else weights["s"])
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
        assert isinstance(bad, np.ndarray)
        assert not bad[:33].any() and bad[33:, 0].all() and not bad[:, 1].any()
