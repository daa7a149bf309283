"""From an `EngineConfig` to a running engine: files, plan, weights, KV pool, tokenizer."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pace import ops
from pace.checkpoint import Checkpoint, GenerationDefaults, load_generation_defaults, read_json, resolve
from pace.checkpoint.config_json import checkpoint_file
from pace.config import PACE_CPUS, PACE_THREADS, EngineConfig
from pace.engine.core import Engine
from pace.engine.memory import MemoryPlan, plan_memory
from pace.engine.runner import Runner
from pace.engine.sampler import Sampler
from pace.engine.scheduler import Scheduler
from pace.errors import CheckpointError, ConfigError
from pace.kvcache import make_tables
from pace.log import logger
from pace.models.decoder import lower
from pace.models.plan import Attention, F32Array, Plan
from pace.models.registry import parse_config
from pace.models.spec import DecoderSpec
from pace.models.weights import Progress, SourcePart, WeightMap, load_weights
from pace.text.tokenizer import Tokenizer

__all__ = ["Loaded", "PackedSink", "load", "make_team"]

SCORED_ROWS = 64
"""Prompt rows of one step whose log probabilities may be asked for; beside them every sequence has a row of its own."""


class PackedSink:
    """Receives a plan's weights: matrices are packed by the team that will read them, vectors kept as f32."""

    def __init__(self, team: ops.Team) -> None:
        self.team = team
        self.weights: dict[str, ops.PackedMatrix | F32Array] = {}

    def matrix(self, name: str, n: int, k: int, parts: Iterator[SourcePart]) -> None:
        """Pack a matrix [n, k] part by part."""
        packed = ops.PackedMatrix(self.team, n, k)
        for array, dtype, at, mode in parts:
            packed.pack(array, dtype, at, mode)
        self.weights[name] = packed

    def vector(self, name: str, values: F32Array) -> None:
        """Keep a vector [n]."""
        self.weights[name] = values

    @property
    def n_bytes(self) -> int:
        """Bytes of everything received."""
        return sum(weight.nbytes for weight in self.weights.values())


@dataclass
class Loaded:
    """An engine and what it was made of.

    Attributes:
        directory: the checkpoint's folder.
        tokenizer_directory: the folder of the tokenizer and the chat template.
        memory: what was allocated.
        weights_bytes: packed weights.
        load_s: wall time of loading.
    """

    engine: Engine
    directory: Path
    tokenizer_directory: Path
    spec: DecoderSpec
    plan: ops.Plan
    team: ops.Team
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults
    memory: MemoryPlan
    weights_bytes: int
    load_s: float


def load(
    config: EngineConfig,
    *,
    show_progress: bool | None = None,
    skip_tokenizer: bool = False,
    random_weights: bool = False,
    on_plan: Callable[[MemoryPlan], None] | None = None,
) -> Loaded:
    """Load a model. Everything that can be refused is refused before the first weight is read.

    Args:
        show_progress: a progress bar on stderr; None: where that is a terminal.
        skip_tokenizer: token ids in, token ids out.
        random_weights: of the checkpoint read only config.json, and invent the weights; for benchmarks.
        on_plan: told what will be allocated, before anything is.

    Raises:
        CheckpointError, ConfigError, CapacityError: see the parts.
    """
    start = time.perf_counter()
    ops.check_kernels(config.kernels)
    directory = resolve(config.model, config.revision)
    values = _read_config(directory)
    spec, weight_map = parse_config(values, str(directory / "config.json"))
    memory = plan_memory(
        lower(spec, 1),
        max_len=spec.max_len,
        max_model_len=_check_len(config.max_model_len, spec.max_len),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_logit_rows=config.max_num_seqs + SCORED_ROWS,
        kv_cache_type=config.kv_cache_type,
        kv_cache_dtype=config.kv_cache_dtype,
        kv_cache_memory=config.kv_cache_memory,
        block_size=config.block_size,
        l2_bytes=int(ops.cpu_info()["l2_bytes"]),
    )
    if config.max_model_len is None and memory.max_model_len < spec.max_len:
        logger.warning(
            "max_model_len is %d: the KV cache can't hold the checkpoint's %d tokens",
            memory.max_model_len,
            spec.max_len,
        )
    logger.info("memory plan: %s", memory.describe())
    if on_plan is not None:
        on_plan(memory)
    tokenizer = None
    tokenizer_directory = directory
    if not skip_tokenizer:
        if config.tokenizer is not None:
            tokenizer_directory = resolve(config.tokenizer, tokenizer_only=True)
        tokenizer = Tokenizer(
            tokenizer_directory,
            vocab_size=spec.vocab_size,
            max_model_len=memory.max_model_len,
            trust_patterns=config.trust_tokenizer,
        )
    eos_id = None if tokenizer is None else tokenizer.eos_token_id
    defaults = load_generation_defaults(
        directory, values, vocab_size=spec.vocab_size, tokenizer_eos_id=eos_id
    )
    plan = lower(spec, memory.max_model_len)
    team = make_team(config)
    try:
        sink = PackedSink(team)
        with _progress_bar(show_progress) as progress:
            if random_weights:
                _invent(plan, sink)
            else:
                _read_weights(directory, plan, weight_map, sink, progress)
        engine, executor = _build(config, plan, sink, team, memory, defaults, tokenizer)
    except BaseException:
        team.close()
        raise
    load_s = time.perf_counter() - start
    logger.info(
        "loaded %s in %.2f s, weights %d MiB, %d threads",
        directory,
        load_s,
        sink.n_bytes >> 20,
        team.n_threads,
    )
    return Loaded(
        engine,
        directory,
        tokenizer_directory,
        spec,
        executor,
        team,
        tokenizer,
        defaults,
        memory,
        sink.n_bytes,
        load_s,
    )


def make_team(config: EngineConfig) -> ops.Team:
    """The thread team that the options, else the environment, else the machine ask for."""
    cpus = config.cpus if config.cpus is not None else PACE_CPUS.get()
    n_threads = config.n_threads if config.n_threads is not None else PACE_THREADS.get()
    if n_threads is None:
        n_threads = ops.default_threads()[0] if cpus is None else len(cpus)
    if cpus is not None and n_threads > len(cpus):
        raise ConfigError(f"{n_threads} threads on {len(cpus)} CPUs; name as many CPUs, or lower the threads")
    return ops.Team(n_threads, None if cpus is None else cpus[:n_threads])


def _read_config(directory: Path) -> dict[str, Any]:
    path = checkpoint_file(directory, "config.json")
    if path is None:
        raise CheckpointError(
            f"{directory}: no config.json; expected the folder of a Hugging Face checkpoint"
        )
    return read_json(path)


def _check_len(max_model_len: int | None, max_len: int) -> int | None:
    if max_model_len is not None and max_model_len > max_len:
        raise ConfigError(
            f"max_model_len is {max_model_len}, the checkpoint supports {max_len} tokens; lower it"
        )
    return max_model_len


def _read_weights(
    directory: Path, plan: Plan, weight_map: WeightMap, sink: PackedSink, progress: Progress | None
) -> None:
    with Checkpoint(directory) as checkpoint:
        load_weights(plan, weight_map, checkpoint, sink, progress)


def _build(
    config: EngineConfig,
    plan: Plan,
    sink: PackedSink,
    team: ops.Team,
    memory: MemoryPlan,
    defaults: GenerationDefaults,
    tokenizer: Tokenizer | None,
) -> tuple[Engine, ops.Plan]:
    max_seqs, max_tokens = config.max_num_seqs, config.max_num_batched_tokens
    n_logit_rows = max_seqs + SCORED_ROWS
    contiguous = config.kv_cache_type == "contiguous"
    kv_pool = ops.KVPool(
        plan.n_layers,
        plan.n_kv_heads,
        plan.head_dim,
        memory.n_blocks,
        memory.block_size,
        dtype=config.kv_cache_dtype,
        contiguous=contiguous,
    )
    executor = ops.Plan(team, plan, sink.weights, kv_pool, max_tokens, max_seqs, n_logit_rows, config.kernels)
    max_window = _max_window(plan)
    tables = make_tables(
        config.kv_cache_type,
        memory.n_blocks,
        memory.block_size,
        max_seqs,
        memory.max_model_len,
        copy=kv_pool.copy,
        prefix_caching=config.enable_prefix_caching,
        max_window=max_window,
    )
    scheduler = Scheduler(
        tables,
        max_tokens,
        reserve=config.admission == "reserve",
        prefix_caching=config.enable_prefix_caching and not contiguous,
        max_scored_rows=SCORED_ROWS,
        windowed=max_window is not None,
    )
    engine = Engine(
        Runner(
            executor, tables.array, 0 if contiguous else memory.block_size, max_tokens, max_seqs, n_logit_rows
        ),
        Sampler(
            executor.sample,
            functools.partial(ops.logprobs, team),
            ops.SAMPLE_DTYPE,
            max_seqs,
        ),
        scheduler,
        vocab_size=plan.vocab_size,
        max_model_len=memory.max_model_len,
        max_num_waiting=config.max_num_waiting,
        eos_token_ids=defaults.eos_token_ids,
        tokenizer=tokenizer,
        seed=config.seed,
    )
    return engine, executor


def _max_window(plan: Plan) -> int | None:
    """The longest window of all layers; None where a layer sees everything."""
    windows = [op.window for op in plan.ops if isinstance(op, Attention)]
    return max(w for w in windows if w is not None) if windows and None not in windows else None


def _invent(plan: Plan, sink: PackedSink) -> None:
    """Random weights of a plausible size: matrices of variance 1 / k, norms of 1, biases of 0."""
    # Slices of one bank: fresh normals for a billion parameters would take longer than the benchmark.
    bank = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    for name, shape in plan.weights().items():
        if shape.k is None:
            sink.vector(name, np.full(shape.n, 0.0 if name.endswith("bias") else 1.0, np.float32))
        else:
            sink.matrix(name, shape.n, shape.k, _bank_rows(bank, shape.n, shape.k))


def _bank_rows(bank: F32Array, n: int, k: int) -> Iterator[SourcePart]:
    step = max(16, (len(bank) // 2 // k) // 16 * 16)
    rng = np.random.default_rng(n * k)
    for at in range(0, n, step):
        rows = min(step, n - at)
        first = int(rng.integers(0, max(1, len(bank) - rows * k)))
        values = np.resize(bank[first : first + rows * k], rows * k).reshape(rows, k)
        yield SourcePart(values * np.float32(k**-0.5), "f32", at, "rows")


@contextmanager
def _progress_bar(show: bool | None) -> Iterator[Callable[[int, int], None] | None]:
    if not (sys.stderr.isatty() if show is None else show):
        yield None
        return
    from tqdm import (
        tqdm,
    )  # comes with tokenizers' huggingface_hub; 20 ms that most imports of pace need not pay

    with tqdm(desc="loading", unit="B", unit_scale=True, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
