"""What law 1 is tried with: crowds of requests, engines that serve them, and the truth of each request, which is the same
request alone, on one thread, in blocks of 16, without a prefix cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from engine import mixed
from ext.kit import Packed, rng
from ext.kit import packed as packed_matrix
from golden import tiny
from hypothesis import strategies as st
from speculative.guess import Continue, Guesser

from pace import ops
from pace.engine.core import Engine
from pace.engine.kv_memory import plan_groups
from pace.engine.runner import Runner
from pace.engine.sampler import Sampler
from pace.engine.scheduler import Scheduler
from pace.engine.sequence import Sequence
from pace.kvcache import KVTables, TokenTables, join_groups, make_tables
from pace.models.formats import Activations, formats_of, products, with_formats, with_orders
from pace.models.plan import Plan
from pace.outputs import CompletionOutput, Logprob, RequestOutput
from pace.params import SamplingParams
from pace.speculative.draft_model import ModelDrafter
from pace.speculative.drafter import Drafter
from pace.speculative.features import PROJECTION, Features, with_features
from pace.speculative.hybrid import HybridDrafter
from pace.speculative.pard import PardDrafter
from pace.speculative.reader import DraftReader
from pace.speculative.speculator import Speculator
from pace.speculative.suffix import SuffixDrafter

GOLDEN_MODELS = ("llama-gqa4-tied", "qwen2-window", "qwen3", "mistral-window")
MODELS = (*GOLDEN_MODELS, *mixed.MODELS, *mixed.FAMILIES)
ROUNDED: dict[str, tuple[str, Activations]] = {
    "int8": ("int8", "int8"),
    "int4": ("int4", "bf16"),
    "int4-int8": ("int4", "int8"),
    "int4-by-group": ("int4", "bf16"),
    "int4-int8-by-group": ("int4", "int8"),
}
"""What "/int4" behind a model's name means: its matrices' format, and that of the rows that they meet; "-by-group": their
columns stand in an order of their own."""
QUANTISED = (
    "qwen3/int8",
    "qwen3/int4-int8",
    "qwen3/int4-int8-by-group",
    "mistral-window/int4",
    "mistral-window/int4-by-group",
    "experts/int8",
    "experts/int4",
    "gemma-3/int4-int8",
)
TAPS = (1, 3)
"""Depths of a family at which a PARD-2 draft listens."""
MAX_LEN = 330  # prompt and output; more than one attention piece of 256
N_OUTPUT = 40
N_PROMPTS = (1, 15, 33, 90, 200, 270)
SCORED_ROWS = 16
STYLES: tuple[dict[str, Any], ...] = (
    {},
    {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 2.0, 5: -4.0},
    },
    {"allowed_token_ids": list(range(2, 40)), "top_k": 7, "top_p": 0.9, "min_p": 0.01},
    {"stop_token_ids": list(range(0, tiny.VOCAB_SIZE, 9)), "min_tokens": 8},
)
"""Sampling parameters by which a token depends on those before it, and ends."""

K = (1, 2, 3, 8, 12, 16)
MASK = tiny.VOCAB_SIZE - 1


@dataclass(frozen=True)
class Ask:
    """One request of a crowd.

    Args:
        stream: which tokens its prompt begins with.
        n_prompt: an index into N_PROMPTS.
        own_end: its last prompt token is not the stream's.
        style: an index into STYLES.
        arrival: the step before which it arrives.
        abort: the step before which it is aborted.
    """

    stream: int
    n_prompt: int
    own_end: bool
    n_output: int
    temperature: float
    n: int
    priority: int
    scored: bool
    style: int
    arrival: int
    abort: int | None


ASKS = st.builds(
    Ask,
    stream=st.integers(0, 1),
    n_prompt=st.integers(0, len(N_PROMPTS) - 1),
    own_end=st.booleans(),
    n_output=st.integers(1, N_OUTPUT),
    temperature=st.sampled_from([0.0, 0.8]),
    n=st.sampled_from([1, 1, 1, 2]),
    priority=st.integers(0, 1),
    scored=st.sampled_from([False, False, False, True]),
    style=st.sampled_from([0, 0, 0, 1, 2, 3]),
    arrival=st.integers(0, 30),
    abort=st.sampled_from([None, None, None, 3, 20, 40]),
)
CACHES = st.one_of(
    st.tuples(st.just("slab"), st.sampled_from([32, 64, 256])),
    st.tuples(st.just("paged"), st.just(16)),
    st.tuples(st.just("contiguous"), st.sampled_from([32, 256])),
)
GUESSES = st.one_of(
    st.fixed_dictionaries(
        {
            "max_tokens": st.sampled_from(K),
            "wrong": st.sampled_from([0, 0, 1, 9]),
            "ragged": st.booleans(),
        }
    ),
    st.fixed_dictionaries(
        {
            "max_tokens": st.sampled_from(K),
            "draft": st.sampled_from(["llama-gqa4-tied", "mistral-window", "same", "qwen3/int4-int8"]),
            "method": st.sampled_from(["pard", "draft_model", "hybrid"]),
        }
    ),
    st.fixed_dictionaries({"max_tokens": st.sampled_from(K), "method": st.just("suffix")}),
)
CROWDS = st.fixed_dictionaries(
    {
        "asks": st.lists(ASKS, min_size=1, max_size=7),
        "cache": CACHES,
        "kv_dtype": st.sampled_from(["bf16", "bf16", "int8"]),
        "n_threads": st.integers(1, 2),
        "n_full": st.integers(1, 3),
        "max_num_seqs": st.integers(1, 5),
        "max_tokens": st.sampled_from([6, 17, 64, 300]),
        "reserve": st.booleans(),
        "prefix_caching": st.booleans(),
        "max_step": st.sampled_from([8, 40, 256]),
        "guesses": st.none() | GUESSES,
    }
)


def talkative(max_tokens: int) -> SuffixDrafter:
    """It guesses on whatever that is worth, and knows what others were answered: random weights repeat little."""
    return SuffixDrafter(max_tokens, least=0.0, past_tokens=500)


class Lab:
    """Engines over packed models, and the truth of requests, computed once."""

    def __init__(self, packed_model: Callable[[str], Packed]) -> None:
        self.packed_model = packed_model
        self.teams = {n: ops.Team(n) for n in (1, 2)}
        self.truth = functools.cache(self._truth)
        self.model = functools.cache(self._model)

    def _model(self, name: str) -> tuple[Plan, dict[str, Any]]:
        base, _, rounded = name.partition("/")
        if rounded in ("heard", "hearing"):
            return self._pard2(base, rounded)
        if base in GOLDEN_MODELS:
            packed = self.packed_model(base)
            plan, weights = packed.model.plan, packed.model.weights
        else:
            plan = mixed.plan_of(base, MAX_LEN)
            weights = mixed.weights_of(plan)
        if rounded:
            scheme, rows = ROUNDED[rounded]
            if rounded.endswith("-by-group"):
                plan = with_orders(plan, products(plan))
                weights = weights | {
                    name: rng(name).permutation(shape.n).astype(np.float32)
                    for name, shape in plan.weights.items()
                    if shape.order_of is not None
                }
            plan = with_formats(plan, formats_of(plan, scheme), rows)
        return plan, mixed.in_formats(self.teams[1], plan, weights)

    def _pard2(self, name: str, side: str) -> tuple[Plan, dict[str, Any]]:
        """A family whose states are "heard", or one that is "hearing" them, as loudly as it reads tokens."""
        plan, weights = self.model(name)
        if side == "heard":
            return mixed.plan_of(name, MAX_LEN, TAPS), weights
        width = len(TAPS) * mixed.DIM
        projection = rng("projection").standard_normal((mixed.DIM, width)).astype(np.float32)
        return with_features(plan, width, 0.5, bias=False), weights | {
            PROJECTION: packed_matrix(self.teams[1], projection)
        }

    def engine(
        self,
        model: str,
        *,
        cache: tuple[str, int],
        kv_dtype: str,
        n_threads: int,
        n_full: int,
        max_num_seqs: int,
        max_tokens: int,
        reserve: bool,
        prefix_caching: bool,
        max_step: int = 256,
        guesses: dict[str, Any] | None = None,
        follow: Continue | None = None,
    ) -> Engine:
        max_tokens = max(max_tokens, max_num_seqs)
        max_draft_rows = 0 if guesses is None else max(20, guesses["max_tokens"])
        n_logit_rows = max_num_seqs + SCORED_ROWS + max_draft_rows
        options = (cache, kv_dtype, n_threads, n_full, max_num_seqs, max_tokens, prefix_caching, max_step)
        hears = guesses is not None and guesses.get("method") == "pard2"
        plan, executor, tables = self.parts(f"{model}/heard" if hears else model, *options, n_logit_rows)
        shares = prefix_caching and cache[0] != "contiguous"
        drafter: Drafter | None = None
        if guesses is not None and guesses.get("method") == "suffix":
            drafter = talkative(guesses["max_tokens"])
        elif guesses is not None and follow is not None and "draft" not in guesses:
            drafter = Guesser(follow, **guesses)
        elif guesses is not None:
            draft = model if guesses["draft"] == "same" else guesses["draft"]
            draft += "/hearing" * hears
            _, draft_executor, draft_tables = self.parts(draft, *options, max_draft_rows)
            reader = DraftReader(
                draft_executor,
                draft_tables,
                ops.SAMPLE_DTYPE,
                vocab_size=tiny.VOCAB_SIZE,
                max_tokens=max_tokens,
                max_seqs=max_num_seqs,
                max_logit_rows=max_draft_rows,
                max_len=MAX_LEN,
                features=Features(TAPS) if hears else None,
                never=np.array([MASK], np.int32),
                prefix_caching=shares,
            )
            n = guesses["max_tokens"]
            drafter = (
                ModelDrafter(reader, n)
                if guesses["method"] == "draft_model"
                else PardDrafter(reader, MASK, n)
            )
            if guesses["method"] == "hybrid":
                drafter = HybridDrafter(drafter, talkative(n))
        speculation = None if drafter is None else Speculator(drafter, plan.vocab_size, max_draft_rows)
        if speculation is not None:
            speculation.bind(executor.slot)
        return Engine(
            Runner(executor, tables.groups, max_tokens, max_num_seqs, n_logit_rows),
            Sampler(
                executor.sample,
                functools.partial(ops.logprobs, self.teams[n_threads]),
                ops.SAMPLE_DTYPE,
                max_num_seqs,
            ),
            Scheduler(
                tables,
                max_tokens,
                reserve=reserve,
                prefix_caching=shares,
                max_draft_rows=max_draft_rows,
            ),
            vocab_size=plan.vocab_size,
            max_model_len=MAX_LEN,
            speculation=speculation,
        )

    def parts(
        self,
        model: str,
        cache: tuple[str, int],
        kv_dtype: str,
        n_threads: int,
        n_full: int,
        max_num_seqs: int,
        max_tokens: int,
        prefix_caching: bool,
        max_step: int,
        n_logit_rows: int,
    ) -> tuple[Plan, ops.Plan, KVTables]:
        """A model with a KV cache."""
        plan, weights = self.model(model)
        team = self.teams[n_threads]
        kind, block_size = cache
        contiguous = kind == "contiguous"
        kv = plan_groups(plan, MAX_LEN, max_tokens, kind, kv_dtype, block_size, 1 << 20)
        kv = replace(kv, max_step=min(kv.max_step, max_step))
        kv = kv.divided(n_full * kv.bytes_for(MAX_LEN), MAX_LEN, max_num_seqs)
        pools = [
            ops.KVPool(
                group.n_layers,
                group.n_kv_heads,
                group.head_dim,
                group.n_blocks,
                group.block_size,
                dtype=kv_dtype,
                contiguous=contiguous,
            )
            for group in kv.groups
        ]
        executor = ops.Plan(team, plan, weights, pools, max_tokens, max_num_seqs, n_logit_rows)
        tables = join_groups(
            [
                make_tables(
                    kind,
                    group.n_blocks,
                    group.block_size,
                    max_num_seqs,
                    MAX_LEN,
                    copy=pool.copy,
                    prefix_caching=prefix_caching,
                    reach=group.reach,
                    max_step=kv.max_step,
                )
                for group, pool in zip(kv.groups, pools, strict=True)
            ]
        )
        return plan, executor, tables

    def prompt(self, ask: Ask) -> list[int]:
        rng = np.random.Generator(np.random.PCG64(ask.stream))
        ids: list[int] = rng.integers(0, tiny.VOCAB_SIZE, MAX_LEN).tolist()[: N_PROMPTS[ask.n_prompt]]
        if ask.own_end:
            ids[-1] = (ids[-1] + 1) % tiny.VOCAB_SIZE
        return ids

    def params(self, ask: Ask, n_output: int) -> SamplingParams:
        style = STYLES[ask.style]
        if "min_tokens" in style:
            style = style | {"min_tokens": min(n_output, style["min_tokens"])}
        return SamplingParams(
            **style,
            max_tokens=n_output,
            temperature=ask.temperature,
            n=ask.n if ask.temperature else 1,
            seed=7,
            logprobs=2,
            prompt_logprobs=1 if ask.scored else None,
            ignore_eos=True,
            detokenize=False,
        )

    def _truth(
        self,
        isa: str,
        model: str,
        kv_dtype: str,
        stream: int,
        n_prompt: int,
        own_end: bool,
        temperature: float,
        n: int,
        scored: bool,
        style: int,
    ) -> RequestOutput:
        ask = Ask(stream, n_prompt, own_end, N_OUTPUT, temperature, n, 0, scored, style, 0, None)
        engine = self.engine(
            model,
            cache=("paged", 16),
            kv_dtype=kv_dtype,
            n_threads=1,
            n_full=n,
            max_num_seqs=n,
            max_tokens=MAX_LEN,
            reserve=True,
            prefix_caching=False,
        )
        engine.add_request("truth", self.prompt(ask), self.params(ask, N_OUTPUT))
        outputs: list[RequestOutput] = []
        while engine.has_unfinished:
            outputs += engine.step()
        return outputs[-1]

    def check(self, model: str, asks: list[Ask], kv_dtype: str, **options: Any) -> Engine:
        def follow(seq: Sequence, history: list[int]) -> int:
            truth = self.truth_of(model, asks[int(seq.request_id)], kv_dtype).outputs[seq.index].token_ids
            at = len(history) - seq.n_prompt
            return truth[at] if at < len(truth) else 0

        engine = self.engine(model, kv_dtype=kv_dtype, follow=follow, **options)
        done: dict[str, RequestOutput] = {}
        tick = 0
        while tick <= 40 or engine.has_unfinished:
            for i, ask in enumerate(asks):
                if ask.arrival == tick:
                    engine.add_request(
                        str(i), self.prompt(ask), self.params(ask, ask.n_output), priority=ask.priority
                    )
                if ask.abort == tick:
                    engine.abort(str(i))
            done.update((output.request_id, output) for output in engine.step())
            self.check_held(engine, (options.get("guesses") or {"max_tokens": 0})["max_tokens"])
            tick += 1
            assert tick < 50_000
        for i, ask in enumerate(asks):
            truth = self.truth_of(model, ask, kv_dtype)
            output = done[str(i)]
            for got, want in zip(output.outputs, truth.outputs, strict=True):
                self.compare(ask, got, want)
            if ask.scored and ask.abort is None:
                assert output.prompt_logprobs == truth.prompt_logprobs
        assert engine.stats()["n_repeated_steps"] == 0
        tables = engine.scheduler.tables
        assert (tables.n_free, tables.n_open) == (tables.n_blocks, 0)
        return engine

    def truth_of(self, model: str, ask: Ask, kv_dtype: str) -> RequestOutput:
        return self.truth(
            ops.isa(),
            model,
            kv_dtype,
            ask.stream,
            ask.n_prompt,
            ask.own_end,
            ask.temperature,
            ask.n if ask.temperature else 1,
            ask.scored,
            ask.style,
        )

    def check_held(self, engine: Engine, n_guesses: int) -> None:
        """Layers with a reach hold no more than that, to whole blocks; and what was guessed."""
        for group in engine.scheduler.tables.groups:
            assert isinstance(group, TokenTables)
            if group.reach.n_tokens is not None and group.column_tokens:
                n_rows = len(engine.scheduler.running)
                ragged = max(group.block_size, 32) - 1
                n_tokens = ragged + group.reach.n_tokens - 1 + n_guesses
                assert group.n_used <= n_rows * -(-n_tokens // group.block_size)

    def compare(self, ask: Ask, got: CompletionOutput, want: CompletionOutput) -> None:
        n = len(got.token_ids)
        if ask.abort is None:
            assert n == min(ask.n_output, len(want.token_ids))
            ends = want.finish_reason == "stop" and n == len(want.token_ids)
            assert got.finish_reason == ("stop" if ends else "length"), got.stop_reason
            assert not ends or got.stop_reason == want.stop_reason
        assert list(got.token_ids) == list(want.token_ids)[:n]
        assert got.logprobs is not None and want.logprobs is not None
        expected: list[dict[int, Logprob]] = want.logprobs[:n]
        assert got.logprobs == expected  # floats compared with ==
