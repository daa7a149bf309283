"""The parts of an engine, put together: team, KV pool, compiled plan, scheduler, sampler."""

from __future__ import annotations

import functools

import numpy as np

from pace import ops
from pace.checkpoint import GenerationDefaults
from pace.config import PACE_CPUS, PACE_THREADS, EngineConfig
from pace.engine.core import Engine
from pace.engine.kv_memory import KVMemory
from pace.engine.memory import MemoryPlan
from pace.engine.packing import PackedSink
from pace.engine.runner import Runner
from pace.engine.sampler import Sampler
from pace.engine.scheduler import Scheduler
from pace.engine.speculation import Speculation
from pace.errors import ConfigError
from pace.kvcache import KVTables, join_groups, make_tables
from pace.models.plan import I32Array, Plan
from pace.text.tokenizer import Tokenizer

__all__ = ["SCORED_ROWS", "build_engine", "make_cache", "make_team", "shares_prefixes"]

SCORED_ROWS = 64
"""Rows of logits beside one for every sequence: the LM head runs on so many rows of scored prompts at a time, half as
many as make its matrix multiplication as fast as it gets, in 33 MB at 128k tokens."""


def make_team(config: EngineConfig) -> ops.Team:
    """The thread team that the options, else the environment, else the machine ask for."""
    cpus = config.cpus if config.cpus is not None else PACE_CPUS.get()
    n_threads = config.n_threads if config.n_threads is not None else PACE_THREADS.get()
    if n_threads is None:
        n_threads = ops.default_threads()[0] if cpus is None else len(cpus)
    if cpus is not None and n_threads > len(cpus):
        raise ConfigError(f"{n_threads} threads on {len(cpus)} CPUs; name as many CPUs, or lower the threads")
    return ops.Team(n_threads, None if cpus is None else cpus[:n_threads])


def build_engine(
    config: EngineConfig,
    plan: Plan,
    sink: PackedSink,
    team: ops.Team,
    memory: MemoryPlan,
    defaults: GenerationDefaults,
    tokenizer: Tokenizer | None,
    speculation: Speculation | None = None,
) -> tuple[Engine, ops.Plan]:
    """The engine of a lowered plan and its weights, and the compiled plan that it runs.

    Raises:
        ConfigError: the plan has an operator that no kernel runs.
    """
    max_seqs, max_tokens = config.n_places, config.max_num_batched_tokens
    max_draft_rows = 0 if speculation is None else speculation.max_draft_rows
    n_logit_rows = max_seqs + SCORED_ROWS + max_draft_rows
    kv_pools, tables = make_cache(config, memory.kv, memory.max_model_len)
    executor = ops.Plan(
        team, plan, sink.weights, kv_pools, max_tokens, max_seqs, n_logit_rows, config.kernels
    )
    if speculation is not None:
        speculation.bind(executor.slot)
    scheduler = Scheduler(
        tables,
        max_tokens,
        reserve=config.admission == "reserve",
        prefix_caching=shares_prefixes(config),
        max_draft_rows=max_draft_rows,
    )
    engine = Engine(
        Runner(executor, tables.groups, max_tokens, max_seqs, n_logit_rows),
        Sampler(
            executor.sample,
            functools.partial(ops.logprobs, team),
            ops.SAMPLE_DTYPE,
            max_seqs,
            unused_ids=_unused_ids(tokenizer),
        ),
        scheduler,
        vocab_size=plan.vocab_size,
        dim=plan.dim,
        max_model_len=memory.max_model_len,
        max_num_waiting=config.max_num_waiting,
        max_logprobs=config.max_logprobs,
        eos_token_ids=defaults.eos_token_ids,
        eos_token_id=defaults.eos_token_id,
        tokenizer=tokenizer,
        seed=config.seed,
        speculation=speculation,
    )
    return engine, executor


def make_cache(config: EngineConfig, kv: KVMemory, max_len: int) -> tuple[list[ops.KVPool], KVTables]:
    """The pools of a KV cache, one for each group of layers, and its tables.

    Args:
        kv: what each group gets.
        max_len: longest sequence in tokens.
    """
    contiguous = config.kv_cache_type == "contiguous"
    kv_pools = [
        ops.KVPool(
            group.n_layers,
            group.n_kv_heads,
            group.head_dim,
            group.n_blocks,
            group.block_size,
            dtype=config.kv_cache_dtype,
            contiguous=contiguous,
        )
        for group in kv.groups
    ]
    tables = join_groups(
        [
            make_tables(
                config.kv_cache_type,
                group.n_blocks,
                group.block_size,
                config.n_places,
                max_len,
                copy=pool.copy,
                prefix_caching=config.enable_prefix_caching,
                reach=group.reach,
                max_step=kv.max_step,
            )
            for group, pool in zip(kv.groups, kv_pools, strict=True)
        ]
    )
    return kv_pools, tables


def shares_prefixes(config: EngineConfig) -> bool:
    """Whether computed prompts are kept for later requests."""
    return config.enable_prefix_caching and config.kv_cache_type != "contiguous"


def _unused_ids(tokenizer: Tokenizer | None) -> I32Array:
    """i32 [n]: ids without a token; none where there is no tokenizer, as any id may then mean something."""
    return np.empty(0, np.int32) if tokenizer is None else tokenizer.unused_ids
