"""Decode speed and memory of slab, paged and contiguous KV caches, side by side over the same weights.

    python bench/kv_cache_types.py DIRECTORY --cells 1x128 1x8192 32x128 32x8192 --rounds 5

In every round each type gets a fresh pool in turn, filled to the context, and runs some decode steps; a type is compared
with the others of its round, because the memory bus of a shared machine is not the same from one minute to the next.
Only one pool exists at a time: 32 x 8192 tokens of Llama-3.2-1B are 8.6 GB. What fills it is one prompt, computed once
per pool and copied block by block, so that every page is real memory (untouched pages would all be one page of zeros,
read from the cache). The memory is that of the blocks in use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from statistics import median

import numpy as np

from pace import ops
from pace.checkpoint import Checkpoint, read_json, resolve
from pace.engine.kv_memory import default_block_size
from pace.engine.packing import PackedSink
from pace.kvcache import make_tables
from pace.models.decoder import lower
from pace.models.plan import Batch, Plan
from pace.models.registry import parse_config
from pace.models.weights import Tensors, load_weights, settle_head

TYPES = ("slab", "paged", "contiguous")
WARM_STEPS = 2  # they map what is left to map
SOURCE_TOKENS = 512  # of the prompt that is computed; its blocks fill the rest


@dataclass
class Model:
    """What all pools share."""

    team: ops.Team
    ir: Plan
    sink: PackedSink


@dataclass(frozen=True)
class Cell:
    """So many sequences, each with so many tokens in the cache."""

    n_seqs: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.n_seqs}x{self.context}"


@dataclass(frozen=True)
class Measured:
    """One type in one round: median seconds of a step, bytes of the blocks in use."""

    step_s: float
    n_bytes: int


def load_model(name: str, max_len: int, n_threads: int | None) -> Model:
    """Pack the weights of a checkpoint."""
    directory = resolve(name)
    spec, weight_map = parse_config(read_json(directory / "config.json"))
    team = ops.Team(n_threads or ops.default_threads()[0])
    sink = PackedSink(team)
    with Checkpoint(directory) as checkpoint:
        tensors = Tensors(checkpoint, weight_map, len(spec.layers))
        ir = lower(settle_head(spec, tensors), max_len)
        load_weights(ir, tensors, sink)
    return Model(team, ir, sink)


class Cache:
    """A pool of one type with all sequences of a cell in it."""

    def __init__(
        self, model: Model, cell: Cell, kv_type: str, block_size: int, dtype: str, n_steps: int
    ) -> None:
        self.cell, self.kv_type = cell, kv_type
        ir, n_seqs, max_len = model.ir, cell.n_seqs, cell.context + n_steps
        max_blocks = -(-max_len // block_size)
        n_blocks = n_seqs * (max_blocks + isqrt(max_blocks) + 1)  # an extent is longer than what it holds
        contiguous = kv_type == "contiguous"
        self.pool = ops.KVPool(
            len(ir.kv),
            ir.kv[0].n_kv_heads,
            ir.kv[0].head_dim,
            n_blocks,
            block_size,
            dtype=dtype,
            contiguous=contiguous,
        )
        self.source = min(cell.context, max(SOURCE_TOKENS, block_size))
        self.plan = ops.Plan(
            model.team, ir, model.sink.weights, self.pool, max(self.source, n_seqs), n_seqs, n_seqs
        )
        self.tables = make_tables(
            kv_type, n_blocks, block_size, n_seqs, max_len, copy=self.pool.copy, prefix_caching=False
        )
        self.rng = np.random.default_rng(0)
        self.rows = [self.open(cell.context) for _ in range(n_seqs)]
        self.n_tokens = cell.context

    def open(self, n_tokens: int) -> int:
        row = self.tables.open(0)
        if row is None or not self.tables.extend(row, n_tokens):
            raise RuntimeError(f"{self.kv_type}: the pool is too small for {self.cell.name}")
        return row

    def fill(self) -> None:
        """Compute one prompt, and copy its blocks to wherever there are none."""
        self.step([self.rows[0]], self.source, self.source)
        size, context = self.pool.block_size, self.cell.context
        sources = [self.block(self.rows[0], i) for i in range(self.source // size or 1)]
        for row in self.rows:
            for i in range(-(-context // size)):
                block, source = self.block(row, i), sources[i % len(sources)]
                if row != self.rows[0] or i * size >= self.source:
                    self.pool.copy(source, block, min(size, context - i * size))

    def block(self, row: int, i: int) -> int:
        table = self.tables.array[row]
        return int(table[0]) + i if self.kv_type == "contiguous" else int(table[i])

    def decode(self) -> float:
        """One token for every sequence; seconds."""
        self.n_tokens += 1
        for row in self.rows:
            if not self.tables.extend(row, self.n_tokens):
                raise RuntimeError(f"{self.kv_type}: the pool is too small for {self.cell.name}")
        return self.step(self.rows, self.n_tokens, 1)

    def step(self, rows: Sequence[int], kv_len: int, n_new: int) -> float:
        n = len(rows)
        batch = Batch(
            token_ids=self.rng.integers(0, self.plan.ir.vocab_size, n * n_new, dtype=np.int32),
            q_start=np.arange(n + 1, dtype=np.int32) * np.int32(n_new),
            kv_len=np.full(n, kv_len, np.int32),
            block_tables=np.ascontiguousarray(self.tables.array[list(rows)]),
            logit_rows=np.arange(n_new - 1, n * n_new, n_new, dtype=np.int32),
        )
        start = time.perf_counter()
        self.plan.step(batch)
        return time.perf_counter() - start

    @property
    def n_bytes(self) -> int:
        return self.tables.n_used * self.pool.nbytes // self.pool.n_blocks


def measure(model: Model, cell: Cell, kv_type: str, block_size: int, dtype: str, n_steps: int) -> Measured:
    """One type in one round."""
    cache = Cache(model, cell, kv_type, block_size, dtype, WARM_STEPS + n_steps)
    cache.fill()
    for _ in range(WARM_STEPS):
        cache.decode()
    return Measured(median(cache.decode() for _ in range(n_steps)), cache.n_bytes)


def table(results: dict[tuple[Cell, str], list[Measured]]) -> str:
    """Medians; a ratio is the median over the rounds of the best type's time over this one's."""
    lines = [
        f"{'sequences':>9} {'context':>8} {'type':<11}{'step ms':>10}{'tok/s':>10}{'to best':>9}{'MiB':>10}"
    ]
    for cell in dict.fromkeys(cell for cell, _ in results):
        rows = {kv_type: rounds for (of, kv_type), rounds in results.items() if of == cell}
        steps = {kv_type: median(r.step_s for r in rounds) for kv_type, rounds in rows.items()}
        best = rows[min(steps, key=lambda kv_type: steps[kv_type])]
        for kv_type, rounds in rows.items():
            ratio = median(b.step_s / r.step_s for b, r in zip(best, rounds, strict=True))
            lines.append(
                f"{cell.n_seqs:9d} {cell.context:8d} {kv_type:<11}{steps[kv_type] * 1e3:10.3f}"
                f"{cell.n_seqs / steps[kv_type]:10.1f}{ratio:9.2f}{rounds[0].n_bytes / (1 << 20):10.1f}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a checkpoint folder, or demo")
    parser.add_argument("--cells", nargs="+", default=["1x128", "32x128", "1x8192", "32x8192"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="decode steps per round")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--block-size", type=int, help="of all types; default: what suits each")
    parser.add_argument("--kv-cache-dtype", choices=("bf16", "int8"), default="bf16")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    cells = [Cell(*map(int, name.split("x"))) for name in args.cells]
    longest = max(cell.context for cell in cells) + args.steps + WARM_STEPS
    model = load_model(args.model, longest, args.threads)
    results: dict[tuple[Cell, str], list[Measured]] = {(c, t): [] for c in cells for t in args.types}
    n_types = len(args.types)
    for cell in cells:
        for i in range(args.rounds):
            # Each is first, and last, as often as the others.
            for kv_type in [*args.types[i % n_types :], *args.types[: i % n_types]]:
                size = args.block_size or default_block_size(
                    kv_type, args.kv_cache_dtype, model.ir.kv[0].head_dim, ops.cpu_info()["l2_bytes"], longest
                )
                found = measure(model, cell, kv_type, size, args.kv_cache_dtype, args.steps)
                results[cell, kv_type].append(found)
                print(f"{cell.name} round {i} {kv_type}: {found.step_s * 1e3:.3f} ms", flush=True)
    print(table(results))
    model.team.close()


if __name__ == "__main__":
    main()
