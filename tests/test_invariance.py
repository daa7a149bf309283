"""Law 1: a sequence's logits are the same bytes whatever the company, the chunks, the threads and the KV cache.

The truth of an example is one prefill of a long stream of tokens, alone, with one thread and blocks of
16 in order; bf16 and int8 caches have their own. Every example replays prefixes of such streams on a random
schedule and compares bytes: a row's logits depend on nothing but the tokens up to it. Pools are reused from
example to example, so the blocks hold old sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from ext.kit import Packed
from golden import tiny
from golden.harness import batch_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pace import ops

MODELS = (
    "llama-gqa4-tied",
    "llama-head80-biases",
    "llama-head128",
    "qwen2-window",
    "qwen3",
    "mistral-window",
    "rope-yarn",
)
N_STREAMS = 3
N_TOKENS = 300  # more than one attention piece of 256
BLOCK_SIZES = (16, 32, 64, 128, 256)
DTYPES = ops.KV_DTYPES
MAX_STEPS = 24  # small steps of one sequence in a quick example; the rest of it is one chunk


@dataclass(frozen=True)
class Part:
    """One sequence of an example: a prefix of a stream and how it is fed.

    Args:
        stream: which tokens.
        n: how many of them.
        first: tokens of the first step (0: none apart from the sizes).
        sizes: step sizes after that, repeated; several rows at once are a chunk, or drafts being verified.
        delay: steps that the sequence waits for.
    """

    stream: int
    n: int
    first: int
    sizes: tuple[int, ...]
    delay: int

    def chunks(self) -> list[int]:
        """Rows of each step; 0 while it waits."""
        out = [0] * self.delay + ([min(self.first, self.n)] if self.first else [])
        for size in cycle(self.sizes):
            left = self.n - sum(out)
            if left == 0:
                return out
            out.append(min(size, left) if len(out) < MAX_STEPS + self.delay else left)
        raise AssertionError("cycle() never ends")


@dataclass(frozen=True)
class KVCache:
    """How the cache is cut and kept."""

    block_size: int
    dtype: str = "bf16"
    contiguous: bool = False

    def blocks(self, n: int) -> int:
        """Blocks of a sequence of n tokens."""
        return -(-n // self.block_size)

    @property
    def n_blocks(self) -> int:
        """Enough for four sequences, and a few that stay unused."""
        return 4 * self.blocks(N_TOKENS) + 3

    def tables(self, lengths: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
        """Scattered blocks, or extents in any order."""
        if not self.contiguous:
            free = rng.permutation(self.n_blocks).tolist()
            return [[free.pop() for _ in range(self.blocks(n))] for n in lengths]
        first, tables = int(rng.integers(0, 3)), [[0]] * len(lengths)
        for i in rng.permutation(len(lengths)):
            tables[i] = [first]
            first += self.blocks(lengths[i])
        return tables


PARTS = st.builds(
    Part,
    stream=st.integers(0, N_STREAMS - 1),
    n=st.integers(1, 48) | st.integers(1, N_TOKENS),
    first=st.sampled_from([0, 0, 1, 7, 16, 31, 64, 200, 250, 260]),
    sizes=st.lists(st.sampled_from([1, 1, 2, 3, 4, 13, 14, 15, 16, 17, 33, 70]), min_size=1, max_size=4).map(
        tuple
    ),
    delay=st.integers(0, 3),
)
EXAMPLES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(MODELS),
        "parts": st.lists(PARTS, min_size=1, max_size=4),
        "n_threads": st.integers(1, 3),
        "kv": st.builds(
            KVCache, st.sampled_from(BLOCK_SIZES), st.sampled_from(["bf16", "bf16", "int8"]), st.booleans()
        ),
        "shuffle": st.integers(0, 1000),
        "every": st.sampled_from([1, 1, 2, 5]),
    }
)
LONG = (Part(0, 300, 250, (1, 13), 0), Part(1, 290, 0, (64, 1, 33), 1), Part(2, 20, 0, (1,), 2))


class Lab:
    """Runners and truths, made once per tier."""

    def __init__(self, packed_model: Callable[[str], Packed]) -> None:
        self.packed_model = packed_model
        self.teams = {n: ops.Team(n) for n in (1, 2, 3)}
        self.runners: dict[tuple[str, str, int, KVCache], ops.Plan] = {}
        self.truths: dict[tuple[str, str, int, str], np.ndarray] = {}

    def runner(self, model: str, n_threads: int, kv: KVCache) -> ops.Plan:
        key = (ops.isa(), model, n_threads, kv)
        if key not in self.runners:
            self.runners[key] = self.packed_model(model).runner(
                self.teams[n_threads],
                n_blocks=kv.n_blocks,
                block_size=kv.block_size,
                max_tokens=4 * N_TOKENS,
                kv_dtype=kv.dtype,
                contiguous=kv.contiguous,
            )
        return self.runners[key]

    def tokens(self, model: str, stream: int) -> list[int]:
        rng = np.random.Generator(np.random.PCG64([tiny.seed_of(model), stream]))
        return [int(t) for t in rng.integers(0, tiny.VOCAB_SIZE, N_TOKENS)]

    def truth(self, model: str, stream: int, dtype: str = "bf16") -> np.ndarray:
        """Logits [N_TOKENS, vocab_size] of a stream alone: one step, one thread, blocks of 16 in order."""
        key = (ops.isa(), model, stream, dtype)
        if key not in self.truths:
            table = list(range(-(-N_TOKENS // 16)))
            batch = batch_of([(self.tokens(model, stream), 0, table)])
            self.truths[key] = self.runner(model, 1, KVCache(16, dtype)).step(batch).copy()
            assert np.isfinite(self.truths[key]).all()
        return self.truths[key]

    def check(
        self, model: str, parts: Sequence[Part], n_threads: int, kv: KVCache, shuffle: int, every: int
    ) -> None:
        """Run the parts together and compare every row that is asked for with the truth."""
        truths = [self.truth(model, part.stream, kv.dtype) for part in parts]
        runner = self.runner(model, n_threads, kv)
        rng = np.random.Generator(np.random.PCG64(shuffle))
        tables = kv.tables([part.n for part in parts], rng)
        plans = [part.chunks() for part in parts]
        done = [0] * len(parts)
        for t in range(max(map(len, plans))):
            running = [i for i in rng.permutation(len(parts)) if t < len(plans[i]) and plans[i][t]]
            if not running:
                continue
            batch_parts, where = [], []
            for i in running:
                n = plans[i][t]
                tokens = self.tokens(model, parts[i].stream)[done[i] : done[i] + n]
                batch_parts.append((tokens, done[i], tables[i]))
                where += [(i, done[i] + j) for j in range(n)]
                done[i] += n
            rows = list(range(0, len(where), every))
            logits = runner.step(batch_of(batch_parts, logit_rows=rows))
            for got, row in zip(logits, rows, strict=True):
                i, position = where[row]
                want = truths[i][position]
                assert got.tobytes() == want.tobytes(), (
                    f"sequence {i} at position {position}, step {t}: "
                    f"{int((got != want).sum())} of {len(want)} logits differ, "
                    f"by {np.abs(got - want).max()} at most"
                )


@pytest.fixture(scope="module")
def lab(packed_model: Callable[[str], Packed]) -> Iterator[Lab]:
    lab = Lab(packed_model)
    yield lab
    for team in lab.teams.values():
        team.close()


QUICK = settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(case=EXAMPLES)
@example(case={"model": "qwen3", "parts": LONG, "n_threads": 2, "kv": KVCache(32), "shuffle": 1, "every": 1})
@example(
    case={
        "model": "llama-head80-biases",
        "parts": LONG,
        "n_threads": 3,
        "kv": KVCache(16, "int8"),
        "shuffle": 3,
        "every": 1,
    }
)
@example(
    case={
        "model": "mistral-window",
        "parts": LONG,
        "n_threads": 3,
        "kv": KVCache(16, contiguous=True),
        "shuffle": 2,
        "every": 1,
    }
)
@QUICK
def test_best_tier(lab: Lab, case: dict[str, Any]) -> None:
    lab.check(**case)


@given(case=EXAMPLES)
@settings(QUICK, max_examples=15)
def test_every_tier(lab: Lab, isa: str, case: dict[str, Any]) -> None:
    lab.check(**case)


@pytest.mark.slow
@given(case=EXAMPLES)
@settings(QUICK, max_examples=2000, derandomize=False)
def test_every_tier_long(lab: Lab, isa: str, case: dict[str, Any]) -> None:
    lab.check(**case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_token_by_token(lab: Lab, isa: str, model: str, dtype: str) -> None:
    """The plainest form: one prompt in one step, and the same prompt one token a step."""
    truth = lab.truth(model, 0, dtype)[:48]
    runner = lab.runner(model, 2, KVCache(16, dtype))
    for i, token in enumerate(lab.tokens(model, 0)[:48]):
        assert runner.step(batch_of([([token], i, [5, 2, 9])]))[0].tobytes() == truth[i].tobytes(), i


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_and_blocks(lab: Lab, isa: str, n_threads: int, block_size: int) -> None:
    whole = [Part(0, 290, 0, (290,), 0)]
    for contiguous in (False, True):
        lab.check("llama-gqa4-tied", whole, n_threads, KVCache(block_size, "bf16", contiguous), 7, 1)
        lab.check("qwen2-window", whole, n_threads, KVCache(block_size, "int8", contiguous), 7, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 5, 13, 16])
def test_rejected_drafts_leave_no_trace(lab: Lab, isa: str, k: int, dtype: str) -> None:
    """Verification: k wrong tokens are run, rejected and overwritten; what follows is as if they never
    were.
    """
    model = "qwen3"
    truth, tokens = lab.truth(model, 0, dtype), lab.tokens(model, 0)
    runner, table = lab.runner(model, 2, KVCache(16, dtype)), [3, 0, 8, 1, 7]
    runner.step(batch_of([(tokens[:29], 0, table)], logit_rows=[]))
    for at in range(29, 45):
        wrong = [tokens[at], *((t + 1) % tiny.VOCAB_SIZE for t in tokens[at + 1 : at + k])]
        logits = runner.step(batch_of([(wrong, at, table)]))
        assert logits[0].tobytes() == truth[at].tobytes(), at


def test_the_tests_can_fail(lab: Lab) -> None:
    """One wrong token in the past changes the bytes."""
    model = "llama-gqa4-tied"
    tokens = lab.tokens(model, 0)[:20]
    tokens[3] = (tokens[3] + 1) % tiny.VOCAB_SIZE
    logits = lab.runner(model, 2, KVCache(16)).step(batch_of([(tokens, 0, [1, 0])]))
    truth = lab.truth(model, 0)
    assert logits[2].tobytes() == truth[2].tobytes()
    assert logits[19].tobytes() != truth[19].tobytes()
