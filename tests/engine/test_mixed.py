"""Models whose layers differ, through the tables of every cache type, beside float64: what is released is not read.

The float64 interpreter steps through the same tables over the same blocks; whatever nobody holds is NaN there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import pytest
from engine import mixed
from golden import tiny
from golden.harness import batch_of, relative_error

from pace import ops
from pace.kvcache import BlockTables, ExtentTables, KVTables, blocks_for, join_groups, make_tables
from pace.models.plan import Batch, Plan
from pace.reference import Reference

KVDtype = Literal["bf16", "int8"]

SIZE, N_BLOCKS, MAX_LEN = 16, 40, 200
LENGTHS = (120, 75)
TOLERANCE = 40 * 2.0**-9  # ten roundings to bf16 in each of up to four layers


class Both:
    """The compiled plan and the interpreter over one set of tables."""

    def __init__(self, team: ops.Team, plan: Plan, kind: str, kv_dtype: KVDtype) -> None:
        contiguous = kind == "contiguous"
        weights = {name: mixed.rounded(w) for name, w in mixed.weights_of(plan).items()}
        self.layers = [group.layers for group in plan.groups()]
        self.pools = [
            ops.KVPool(
                len(group.layers),
                group.layer.n_kv_heads,
                group.layer.head_dim,
                N_BLOCKS,
                SIZE,
                kv_dtype,
                contiguous,
            )
            for group in plan.groups()
        ]
        self.kernels = ops.Plan(team, plan, mixed.pack(team, plan), self.pools, 64, 4, 64)
        self.exact = Reference(
            plan, weights, N_BLOCKS, SIZE, rounding="bf16", kv_dtype=kv_dtype, contiguous=contiguous
        )
        self.tables = join_groups(
            [
                make_tables(
                    kind,
                    N_BLOCKS,
                    SIZE,
                    4,
                    MAX_LEN,
                    copy=partial(self.copy, i),
                    prefix_caching=True,
                    reach=group.layer.reach,
                    max_step=24,
                )
                for i, group in enumerate(plan.groups())
            ]
        )

    def caches(self, group: int) -> list[np.ndarray]:
        """What the interpreter keeps of a group's layers, each [n_blocks, block_size, heads, columns]."""
        arrays = (self.exact.k, self.exact.v, self.exact.v_scale)
        return [a[i].reshape(N_BLOCKS, SIZE, *a[i].shape[1:]) for i in self.layers[group] for a in arrays]

    def copy(self, group: int, src: int, dst: int, n_tokens: int) -> None:
        self.pools[group].copy(src, dst, n_tokens)
        for cache in self.caches(group):
            cache[dst, :n_tokens] = cache[src, :n_tokens]

    def lose_what_nobody_holds(self) -> None:
        for i, tables in enumerate(self.tables.groups):
            lost = [block for block in range(N_BLOCKS) if not is_held(tables, block)]
            for cache in self.caches(i):
                cache[lost] = np.nan

    def step(self, rows: list[tuple[int, np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Run (row, tokens, first position) for each sequence."""
        batch = batch_of([(tokens.tolist(), at, [0]) for _, tokens, at in rows])
        columns = blocks_for(MAX_LEN, SIZE)
        arrays = tuple(
            np.ascontiguousarray(tables.array[[row for row, _, _ in rows], :columns])
            for tables in self.tables.groups
        )
        batch = replace(batch, block_tables=arrays)
        assert isinstance(batch, Batch)
        return np.array(self.kernels.step(batch)), self.exact.step(batch)


def is_held(tables: KVTables, block: int) -> bool:
    if isinstance(tables, BlockTables):
        return tables.pool.refcount(block) > 0
    assert isinstance(tables, ExtentTables)
    extents = [extent for extent in tables._extents if extent is not None]
    # Of an extent that will slide the head is there, but it is nobody's any more.
    return any(
        extent.start + extent.unseen - extent.head <= block < extent.start + extent.size for extent in extents
    )


@pytest.mark.parametrize(("kind", "kv_dtype"), [("paged", "bf16"), ("contiguous", "int8")])
@pytest.mark.parametrize("model", mixed.MODELS)
def test_what_is_released_is_not_read(team: ops.Team, model: str, kind: str, kv_dtype: KVDtype) -> None:
    plan = mixed.plan_of(model, MAX_LEN)
    both = Both(team, plan, kind, kv_dtype)
    tables = both.tables
    prompts = [
        np.random.default_rng(i).integers(0, tiny.VOCAB_SIZE, n).astype(np.int32)
        for i, n in enumerate(LENGTHS)
    ]
    # All at once, everything kept: the truth.
    whole = Reference(
        plan, both.exact.weights, blocks_for(max(LENGTHS), SIZE), SIZE, rounding="bf16", kv_dtype=kv_dtype
    )
    n_groups = len(both.layers)
    truths = []
    for tokens in prompts:
        batch = batch_of([(tokens.tolist(), 0, list(range(blocks_for(len(tokens), SIZE))))])
        truths.append(whole.step(replace(batch, block_tables=batch.tables * n_groups)))
    rows = [tables.open(len(tokens)) for tokens in prompts]
    done = [0, 0]
    while any(at < len(tokens) for at, tokens in zip(done, prompts, strict=True)):
        step = []
        for i, tokens in enumerate(prompts):
            row, at = rows[i], done[i]
            assert row is not None
            end = min(len(tokens), at + (23, 7)[i], tables.step_end(at))
            if end > at:
                assert tables.extend(row, end)
                step.append((row, tokens[at:end], at, i))
        both.lose_what_nobody_holds()
        kernels, exact = both.step([(row, tokens, at) for row, tokens, at, _ in step])
        start = 0
        for row, tokens, at, i in step:
            n = len(tokens)
            want = truths[i][at : at + n]
            assert relative_error(exact[start : start + n], want) < TOLERANCE
            assert relative_error(kernels[start : start + n], want) < TOLERANCE
            start += n
            done[i] = at + n
            tables.release_before(row, done[i])
    for group in plan.groups():
        assert group.layer.reach is None or group.layer.reach < min(LENGTHS)
