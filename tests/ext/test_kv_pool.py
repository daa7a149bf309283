"""The memory of a cache: blocks copied and mapped ahead, tables and sizes that are refused."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ext.kit import F64, take
from ext.test_attention import DTYPES, Shape, make_rows, plan_of, step

from pace import ops
from pace.errors import ConfigError
from pace.models import plan as ir


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
