"""From an `EngineConfig` to a running engine: files, plan, weights, KV pool, tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pace import ops
from pace.checkpoint import GenerationDefaults, ModelFiles, load_generation_defaults, model_files, resolve
from pace.checkpoint.config_json import adapter_hint
from pace.config import EngineConfig
from pace.engine.build import SCORED_ROWS, build_engine, make_team
from pace.engine.core import Engine
from pace.engine.guard import choose_activations, measure
from pace.engine.memory import MemoryPlan, available_bytes, plan_memory
from pace.engine.packing import PackedSink
from pace.engine.speculation import SpeculationMaker, Target
from pace.engine.weight_source import WeightSource, open_weights
from pace.errors import CheckpointError, ConfigError
from pace.log import logger
from pace.models import rope
from pace.models.formats import with_formats
from pace.models.plan import Plan
from pace.models.quantisation import with_own_file
from pace.models.registry import parse_config
from pace.models.spec import DecoderSpec
from pace.text.harmony import end_ids
from pace.text.template_files import read_template
from pace.text.tokenizer import Tokenizer

__all__ = ["Loaded", "load", "read_config", "with_activations"]


@dataclass
class Loaded:
    """An engine and what it was made of.

    Attributes:
        directory: the checkpoint's folder, or its GGUF file.
        tokenizer_directory: the same of the tokenizer and the chat template.
        chat_template: the one that takes the place of those found there, if any.
        memory: what was allocated.
        weights_bytes: packed weights.
        load_s: wall time of loading.
    """

    engine: Engine
    directory: Path
    tokenizer_directory: Path
    chat_template: str | None
    spec: DecoderSpec
    plan: ops.Plan
    team: ops.Team
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults
    memory: MemoryPlan
    weights_bytes: int
    load_s: float

    def close(self) -> None:
        """End the threads and give back weights and KV cache; `plan` is gone, `engine` closed."""
        self.team.close()
        self.engine.close()
        self.__dict__.pop("plan", None)


def load(
    config: EngineConfig,
    *,
    show_progress: bool | None = None,
    skip_tokenizer: bool = False,
    random_weights: bool = False,
    on_plan: Callable[[MemoryPlan], None] | None = None,
    speculation: SpeculationMaker | None = None,
) -> Loaded:
    """Load a model. Everything that can be refused is refused before the first weight is read.

    Args:
        show_progress: a progress bar on stderr; None: where that is a terminal.
        skip_tokenizer: token ids in, token ids out.
        random_weights: of the checkpoint read only config.json, and invent the weights; for benchmarks.
        on_plan: told what will be allocated, before anything is.
        speculation: makes what guesses tokens; None: nobody does. `pace.speculative.load` knows what config asks for.

    Raises:
        CheckpointError, ConfigError, CapacityError: see the parts.
    """
    start = time.perf_counter()
    ops.check_kernels(config.kernels)
    directory = resolve(config.model, config.revision)
    files = model_files(directory)
    values = read_config(files)
    spec, weight_map = parse_config(values, files.where("config.json"))
    with open_weights(
        config,
        files,
        values,
        spec,
        weight_map,
        quantization=config.quantization,
        random_weights=random_weights,
    ) as source:
        spec = source.spec
        plan = source.lower(1, () if speculation is None else speculation.taps(spec))
        memory = _plan_memory(config, spec, plan, speculation)
        if on_plan is not None:
            on_plan(memory)
        text = _load_text(config, files, values, spec, memory, skip_tokenizer=skip_tokenizer)
        plan = replace(plan, ropes=rope.build_all(spec.ropes, memory.max_model_len))
        team = make_team(config)
        try:
            engine, executor, sink = _build(
                config, source, plan, memory, text, team, speculation, show_progress
            )
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
        text.directory,
        text.chat_template,
        spec,
        executor,
        team,
        text.tokenizer,
        text.defaults,
        memory,
        sink.n_bytes,
        load_s,
    )


def _build(
    config: EngineConfig,
    source: WeightSource,
    plan: Plan,
    memory: MemoryPlan,
    text: _Text,
    team: ops.Team,
    speculation: SpeculationMaker | None,
    show_progress: bool | None,
) -> tuple[Engine, ops.Plan, PackedSink]:
    """The engine, its plan on packed weights, and those; drafts come first, their memory was planned so."""
    guesses = None
    if speculation is not None:
        guesses = speculation.make(
            Target(plan.vocab_size, plan.dim, memory, text.tokenizer, team, show_progress)
        )
    sink = PackedSink(team)
    source.fill(plan, sink, show_progress)
    plan = with_activations(config, plan, sink, text.tokenizer, source)
    engine, executor = build_engine(config, plan, sink, team, memory, text.defaults, text.tokenizer, guesses)
    return engine, executor, sink


def with_activations(
    config: EngineConfig, plan: Plan, sink: PackedSink, tokenizer: Tokenizer | None, source: WeightSource
) -> Plan:
    """The plan with int8 rows where the options, or the guard, want them; the weights are kept with what it measured."""
    measured = None
    if config.activation_dtype == "auto" or source.is_stored:
        measured = measure(plan, sink.weights, sink.team, tokenizer, source.measured)
    source.store(sink.weights, measured)
    if config.activation_dtype == "auto":
        return with_formats(plan, {}, choose_activations(measured))
    return plan if config.activation_dtype == "bf16" else with_formats(plan, {}, "int8")


def read_config(files: ModelFiles) -> dict[str, Any]:
    """The config.json of a checkpoint, with the quantization_config that some tools put into a file of its own.

    Raises:
        CheckpointError: there is none, or it is malformed.
    """
    config = files.json("config.json")
    if config is None:
        raise CheckpointError(
            f"{files.path}: no config.json; expected the folder of a Hugging Face checkpoint{adapter_hint(files.path)}"
        )
    return with_own_file(config, files)


def _plan_memory(
    config: EngineConfig, spec: DecoderSpec, plan: Plan, speculation: SpeculationMaker | None
) -> MemoryPlan:
    if config.activation_dtype != "bf16":
        plan = with_formats(plan, {}, "int8")
    available, n_draft_rows, kv_share = None, 0, 1.0
    if speculation is not None:
        available, n_draft_rows = available_bytes() - speculation.n_bytes, speculation.max_draft_rows
        kv_share = plan.kv_width / (plan.kv_width + speculation.kv_width)
    memory = plan_memory(
        plan,
        max_len=spec.max_len,
        max_model_len=_check_len(config.max_model_len, spec.max_len),
        max_num_seqs=config.n_full_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_logit_rows=config.n_places + SCORED_ROWS + n_draft_rows,
        kv_cache_type=config.kv_cache_type,
        kv_cache_dtype=config.kv_cache_dtype,
        kv_cache_memory=config.kv_cache_memory,
        block_size=config.block_size,
        l2_bytes=int(ops.cpu_info()["l2_bytes"]),
        available=available,
        kv_share=kv_share,
    )
    if config.max_model_len is None and memory.max_model_len < spec.max_len:
        logger.warning(
            "max_model_len is %d: the KV cache can't hold the checkpoint's %d tokens",
            memory.max_model_len,
            spec.max_len,
        )
    for note in {rope.length_note(r, memory.max_model_len) for r in spec.ropes} - {None}:
        logger.warning("%s", note)
    logger.info("memory plan: %s", memory.describe())
    return memory


class _Text(NamedTuple):
    """What stands between text and ids: the place of the tokenizer, a template of one's own, the tokenizer if wanted, and
    defaults."""

    directory: Path
    chat_template: str | None
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults


def _load_text(
    config: EngineConfig,
    files: ModelFiles,
    values: dict[str, Any],
    spec: DecoderSpec,
    memory: MemoryPlan,
    *,
    skip_tokenizer: bool,
) -> _Text:
    chat_template = None if config.chat_template is None else read_template(Path(config.chat_template))
    directory, tokenizer = files.path, None
    if not skip_tokenizer:
        directory, tokenizer = _load_tokenizer(config, files, spec, memory)
    defaults = load_generation_defaults(
        files,
        values,
        vocab_size=spec.vocab_size,
        tokenizer_eos_id=None if tokenizer is None else tokenizer.eos_token_id,
        source=config.generation_config,
    )
    if tokenizer is not None:
        defaults = replace(defaults, eos_token_ids=end_ids(tokenizer, defaults.eos_token_ids))
    if defaults.sampling:
        logger.info("sampling defaults from generation_config.json: %s", dict(defaults.sampling))
    return _Text(directory, chat_template, tokenizer, defaults)


def _load_tokenizer(
    config: EngineConfig, files: ModelFiles, spec: DecoderSpec, memory: MemoryPlan
) -> tuple[Path, Tokenizer]:
    """The place of the tokenizer, and the tokenizer."""
    if config.tokenizer is not None:
        files = model_files(resolve(config.tokenizer, tokenizer_only=True))
    tokenizer = Tokenizer(
        files,
        vocab_size=spec.vocab_size,
        max_model_len=memory.max_model_len,
        trust_patterns=config.trust_tokenizer,
    )
    return files.path, tokenizer


def _check_len(max_model_len: int | None, max_len: int) -> int | None:
    if max_model_len is not None and max_model_len > max_len:
        raise ConfigError(
            f"max_model_len is {max_model_len}, the checkpoint supports {max_len} tokens; lower it"
        )
    return max_model_len
