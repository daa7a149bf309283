"""A model without mathematics: its logits are a hash of everything that it was shown.

Keys and values are a table of tokens that is addressed through the block tables. So a token that was
written to the wrong block, read from somebody else's, skipped or run at the wrong position changes every
later logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pace.engine.core import Engine
from pace.engine.runner import Runner
from pace.engine.sampler import Sampler
from pace.engine.scheduler import Scheduler
from pace.kvcache import join_groups, make_tables
from pace.models.plan import Batch, Bf16Array, F32Array, I32Array
from pace.outputs import RequestOutput
from pace.params import SamplingParams
from pace.speculative.drafter import Drafter
from pace.speculative.speculator import Speculator

VOCAB = 97
SCORED_ROWS = 8

DTYPE = np.dtype(
    [(name, "f4") for name in ("temperature", "top_p", "min_p")]
    + [(f"{name}_penalty", "f4") for name in ("repetition", "presence", "frequency")]
    + [("top_k", "i4"), ("n_logprobs", "i4"), ("seed", "u8"), ("position", "u8"), ("sample_index", "u4")]
)


def logits_of(history: Sequence[int]) -> F32Array:
    """The fake model: f32 [VOCAB] from the whole history."""
    state = np.uint64(1469598103934665603)
    with np.errstate(over="ignore"):
        for token in history:
            state = (state ^ np.uint64(token + 1)) * np.uint64(1099511628211)
        mixed = (state + np.arange(VOCAB, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 22)).astype(np.float32)


class FakeGroup:
    """Tokens of one group of layers, [n_blocks, block_size], of which a query sees the last `reach`."""

    def __init__(
        self, n_blocks: int, block_size: int, reach: int | None = None, contiguous: bool = False
    ) -> None:
        self.cache = np.full((n_blocks, block_size), -1, dtype=np.int64)
        self.reach = reach
        self.contiguous = contiguous

    def copy(self, src: int, dst: int, n_tokens: int) -> None:
        self.cache[dst, :n_tokens] = self.cache[src, :n_tokens]
        self.cache[dst, n_tokens:] = -2

    def cells(self, table: I32Array, first: int, end: int) -> tuple[Any, Any]:
        """Where the positions first .. end - 1 of a sequence lie."""
        at = np.arange(first, end)
        i = at // self.cache.shape[1]
        blocks = table[0] + i if self.contiguous else table[i]
        assert (blocks >= 0).all() and (blocks < len(self.cache)).all()
        return blocks, at % self.cache.shape[1]

    def seen(self, table: I32Array, position: int) -> list[int]:
        """What a query at `position` sees."""
        first = 0 if self.reach is None else max(0, position - self.reach + 1)
        tokens: list[int] = self.cache[self.cells(table, first, position + 1)].tolist()
        return tokens


class FakePlan:
    """A plan.Runner over groups of tokens; keeps what it was asked. The logits are those of what the first group sees, and
    of nonsense where another one sees something else."""

    def __init__(self, groups: Sequence[FakeGroup], max_tokens: int, max_logit_rows: int) -> None:
        self.groups = groups
        self.max_tokens = max_tokens
        self.max_logit_rows = max_logit_rows
        self.steps: list[tuple[int, ...]] = []  # rows of each sequence
        self.nan_token: int | None = None  # histories that hold it have NaN logits
        self.crash: BaseException | None = None  # of the next step
        self.crash_sizes: list[int] = []  # sequences of the steps that crashed

    def step(self, batch: Batch) -> F32Array:
        if self.crash is not None:
            crash, self.crash = self.crash, None
            self.crash_sizes.append(batch.n_seqs)
            raise crash
        assert 0 < batch.n_tokens <= self.max_tokens
        assert batch.q_start[0] == 0 and batch.q_start[-1] == batch.n_tokens
        assert all(
            array.dtype == np.int32 and array.flags.c_contiguous
            for array in (batch.token_ids, batch.q_start, batch.kv_len, *batch.tables, batch.logit_rows)
        )
        self.steps.append(tuple(np.diff(batch.q_start).tolist()))
        positions = batch.positions()
        self.logits = logits = np.zeros((len(batch.logit_rows), VOCAB), dtype=np.float32)
        wanted = dict(zip(batch.logit_rows.tolist(), logits, strict=True))
        for s in range(batch.n_seqs):
            rows = range(batch.q_start[s], batch.q_start[s + 1])
            first, end = int(positions[rows[0]]), int(batch.kv_len[s])
            tables = [(group, tables[s]) for group, tables in zip(self.groups, batch.tables, strict=True)]
            for group, table in tables:
                group.cache[group.cells(table, first, end)] = batch.token_ids[rows[0] : rows[-1] + 1]
            for row in rows:
                if row in wanted:
                    history, *others = (group.seen(table, int(positions[row])) for group, table in tables)
                    agree = all(other[-len(history) :] == history[-len(other) :] for other in others)
                    lost = self.nan_token in history
                    wanted[row][:] = np.nan if lost else logits_of(history if agree else [-1])
        return logits[: self.max_logit_rows].copy()

    def logits_from(self, first: int) -> F32Array:
        assert 0 < first < len(self.logits)
        return self.logits[first : first + self.max_logit_rows].copy()

    def hidden(self) -> Bf16Array:
        raise AssertionError("nothing here asks for hidden states")


class Drawn(NamedTuple):
    tokens: Any
    logprobs: Any
    ranks: Any
    top_ids: Any
    top_logprobs: Any
    errors: Any


def fake_sample(logits: F32Array, params: Any, history: Any, /) -> Drawn:
    """ops.sample in a few lines: greedy, or Gumbel noise from (seed, position); banned ids; no penalties."""
    n = len(logits)
    k = max(1, int(params["n_logprobs"].max()))
    out = Drawn(
        np.zeros(n, np.int32),
        np.zeros(n, np.float32),
        np.zeros(n, np.int32),
        np.full((n, k), -1, np.int32),
        np.zeros((n, k), np.float32),
        np.zeros(n, np.int32),
    )
    for i in range(n):
        x = logits[i].astype(np.float64)
        if np.isnan(x).any():
            out.errors[i] = 1
            continue
        logprobs = x - np.log(np.exp(x).sum())
        scores = x.copy()
        if params["temperature"][i] > 0:
            rng = np.random.default_rng(
                [int(params[name][i]) for name in ("seed", "position", "sample_index")]
            )
            scores = scores / params["temperature"][i] + rng.gumbel(size=VOCAB)
        if history[i] is not None:
            scores[history[i].banned] = -np.inf
        token = int(scores.argmax())
        order = np.argsort(-logprobs, kind="stable")
        out.tokens[i] = token
        out.logprobs[i] = logprobs[token]
        out.ranks[i] = 1 + (logprobs > logprobs[token]).sum()
        out.top_ids[i] = order[:k]
        out.top_logprobs[i] = logprobs[order[:k]]
    return out


def fake_logprobs(logits: F32Array, tokens: Any, n: int, /) -> Any:
    """ops.logprobs in a few lines."""
    x = logits.astype(np.float64)
    logprobs = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    own = logprobs[np.arange(len(x)), tokens]
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, : max(1, n)]
    return Scores(
        own.astype(np.float32),
        1 + (logprobs > own[:, None]).sum(axis=1),
        order.astype(np.int32),
        np.take_along_axis(logprobs, order, axis=1).astype(np.float32),
        np.isnan(x).any(axis=1).astype(np.int32),
    )


class Scores(NamedTuple):
    logprobs: Any
    ranks: Any
    top_ids: Any
    top_logprobs: Any
    errors: Any


class Panic(BaseException):
    """As a panic of a Rust extension: not an Exception."""


class LetterTokenizer:
    """What `TextStream` needs of a tokenizer: token t is a letter, 95 and 96 the halves of one."""

    byte_level = True

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == 91:
            raise Panic("token 91 can't be spelt")
        return {95: b"\xc3", 96: b"\xa9"}.get(token_id) or bytes([97 + token_id % 26])

    def decode_next(self, token_ids: Sequence[int], before: Sequence[int]) -> list[str]:
        return [chr(97 + token_id % 26) for token_id in token_ids]

    def is_special(self, token_id: int) -> bool:
        return False


def make_engine(
    *,
    max_model_len: int = 64,
    max_num_seqs: int = 4,
    max_tokens: int = 16,
    n_blocks: int = 16,
    block_size: int = 16,
    kv_cache_type: str = "slab",
    reaches: Sequence[int | None] = (None,),
    max_step: int | None = None,
    prefix_caching: bool = True,
    reserve: bool = False,
    max_num_waiting: int = 1 << 16,
    max_logprobs: int = -1,
    eos: Sequence[int] = (),
    seed: int = 0,
    drafter: Drafter | None = None,
    max_draft_rows: int = 32,
) -> tuple[Engine, FakePlan]:
    """An engine over the fake model; `reaches` of its groups. The first one sees no less than the others."""
    contiguous = kv_cache_type == "contiguous"
    groups = [FakeGroup(n_blocks, block_size, reach, contiguous) for reach in reaches]
    speculation = None if drafter is None else Speculator(drafter, VOCAB, max_draft_rows)
    max_draft_rows = 0 if drafter is None else max_draft_rows
    n_logit_rows = max_num_seqs + max_draft_rows + SCORED_ROWS
    plan = FakePlan(groups, max_tokens, n_logit_rows)
    tables = join_groups(
        [
            make_tables(
                kv_cache_type,
                n_blocks,
                block_size,
                max_num_seqs,
                max_model_len,
                copy=group.copy,
                prefix_caching=prefix_caching,
                reach=group.reach,
                max_step=max_step,
            )
            for group in groups
        ]
    )
    engine = Engine(
        Runner(plan, tables.groups, max_tokens, max_num_seqs, n_logit_rows),
        Sampler(fake_sample, fake_logprobs, DTYPE, max_num_seqs),
        Scheduler(
            tables,
            max_tokens,
            reserve=reserve,
            prefix_caching=prefix_caching and not contiguous,
            max_draft_rows=max_draft_rows,
        ),
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        max_num_waiting=max_num_waiting,
        max_logprobs=max_logprobs,
        eos_token_ids=frozenset(eos),
        eos_token_id=eos[0] if eos else None,
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]  # as much of one as is asked for
        seed=seed,
        speculation=speculation,
    )
    return engine, plan


def run(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left; the last output of every request."""
    last: dict[str, RequestOutput] = {}
    for _ in range(10_000):
        if not engine.has_unfinished:
            return last
        for output in engine.step():
            last[output.request_id] = output
    raise AssertionError("the engine does not finish")


def greedy(prompt: Sequence[int], n: int) -> list[int]:
    """What the fake model says, computed without an engine."""
    history = list(prompt)
    for _ in range(n):
        history.append(int(logits_of(history).argmax()))
    return history[len(prompt) :]


def params(**values: Any) -> SamplingParams:
    values = {"temperature": 0.0, "detokenize": False, **values}
    return SamplingParams(**values)


def spelt(tokens: Sequence[int]) -> str:
    return b"".join(map(LetterTokenizer().token_bytes, tokens)).decode("utf-8", "replace")
